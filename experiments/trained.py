"""Networks that a finished run has trained, for the runs that build on it."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import functa_jax as fj
from experiments import classification, data, logs, runs
from experiments.checkpoints import Checkpoints, digests
from experiments.config import Options
from experiments.models.functa import Functa
from experiments.runs import RunError
from experiments.studies import functa as study
from experiments.studies import vit
from experiments.training import PyTree


def load_trained(directory: Path, mesh: Mesh) -> tuple[Functa, fj.MetaParams, study.Config]:
    """The Functa of a finished run of the study `functa`, as that run measured it: the state after its last step.

    Args:
      directory: the run's folder, as `runs.finished_run` gives it.
      mesh: devices to fit on; the parameters are replicated over them.

    Returns:
      The Functa, its parameters and learned rates, and the config it was trained with.

    Raises:
      RunError: the run is not finished, or was made by another version of the program.
      CheckpointError: its last checkpoint is gone, or damaged.
    """
    result = runs.read_result(directory)
    if result is None:
        raise RunError(f"{directory} holds no finished run")
    config = runs.from_json(study.Config, result["config"], directory)
    # The run's own log knows the shape of its images, wherever they came from and even if they are gone.
    originals = logs.read_images(directory / "images.jsonl", "test_originals")
    functa = study.build(config, originals[config.steps].shape[1:], mesh)
    state = _state_at(directory, config.steps, partial(study.initial_state, config, functa), mesh)
    return functa, state.params, config


class Base(NamedTuple):
    """A trained image classifier, and the images it was trained for.

    Attributes:
      model: the module, or what is called like one.
      params: its parameters, as the run tested them.
      prepare: brings uint8 images to what the module takes.
      train: split it was trained on.
      validation: split to choose by.
      test: split for the final numbers.
      config: of the run.
      result: of the run.
      mesh: devices.
      batch_stats: running statistics of its batch normalisations; empty if it has none.
    """

    model: Any
    params: PyTree
    prepare: classification.Prepare
    train: data.Split
    validation: data.Split
    test: data.Split
    config: Any
    result: dict[str, Any]
    mesh: Mesh
    batch_stats: PyTree = {}  # noqa: RUF012  (nobody writes into it)

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the model's `apply` takes."""
        return {"params": self.params, **({"batch_stats": self.batch_stats} if self.batch_stats else {})}

    def logits(self, inputs: Array) -> Array:
        """Prepared images (B, H, W, C) -> logits (B, classes)."""
        return jnp.asarray(self.model.apply(self.variables, inputs))

    def measure(self, params: PyTree, split: data.Split, *, model: Any = None) -> dict[str, float]:
        """Accuracy, top-5 accuracy and loss of other parameters, and of another model where one is given."""
        return self.measure_variables(self.variables | {"params": params}, split, model=model)

    def measure_variables(self, variables: PyTree, split: data.Split, *, model: Any = None) -> dict[str, float]:
        """As `measure`, for a network whose batch statistics differ too."""
        return classification.measure(
            model or self.model, variables, split.images, split.labels, self.prepare, self.mesh
        )


def load_base(options: Options, name: str, mesh: Mesh) -> Base:
    """The ViT or Swin of a finished run of the study `vit`, for the studies that prune it.

    Args:
      options: whose `runs_dir` and `data_dir` are used.
      name: of the run's folder, such as "cpu-0".
      mesh: devices.

    Raises:
      RunError: the run is not there, not finished, or was made by another version of the program.
      CheckpointError: its last checkpoint is gone, or damaged.
    """
    directory, result = runs.finished_run(options, "vit", name)
    config = runs.from_json(vit.Config, result["config"], directory)
    train, validation, test = data.load_splits(config.dataset, images=config.images, data_dir=options.data_dir)
    model, optimizer = vit.build(config, train), vit.make_optimizer(config, len(train.labels))
    prepare = vit.make_prepare(config, train)

    def initial() -> classification.State:
        return classification.initialise(model, optimizer, prepare(jnp.asarray(train.images[:1])), jax.random.key(0))

    steps = config.epochs * (len(train.labels) // config.batch_size)
    params = vit.final_params(config, _state_at(directory, steps, initial, mesh))
    return Base(model, params, prepare, train, validation, test, config, result, mesh)


def _state_at(directory: Path, step: int, initial: Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """The checkpoint of a step, replicated over the mesh; `initial` gives a state of the same form."""
    everywhere = NamedSharding(mesh, P())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(initial))
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        return checkpoints.load(step, like)
    finally:
        checkpoints.close()


def model_checksum(params: fj.MetaParams) -> str:
    """Digest of the parameters and the learned rates of a Functa: latents belong to one of them and no other."""
    arrays = digests(params)
    return hashlib.blake2b(repr(sorted(arrays.items())).encode(), digest_size=16).hexdigest()
