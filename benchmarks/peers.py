"""Adapters that run the published code of others, unchanged, from its checkout: see README.md for where to get it.

Each adapter calls the peer's own training step on random images. It runs under the peers' Python interpreter, which
needs nothing of this project: `python -m benchmarks.peers NAME FOLDER SETTING-AS-JSON`.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmarks import px_code
from benchmarks.turns import Setting, turns


def _stand_in(name: str, **attributes: object) -> None:
    """Make `import name` succeed: for what a peer imports (frames, data, logs, plots) but does not use in a step."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def deepmind_functa(clock: Iterator[None], peers: Path, s: Setting, log_psnr: bool = True) -> None:
    """DeepMind's functa: `Experiment._update_func` under pmap; meta-SGD, second order, Adam.

    Its step fits the latents once more after the update, only to log the PSNR; without the logged numbers (`log_psnr`
    false) the compiler drops that second fit.
    """
    import haiku as hk
    import jax
    import jax.numpy as jnp
    import optax

    frame = SimpleNamespace(AbstractExperiment=object)
    _stand_in("jaxline", base_config=None, experiment=frame, platform=None, utils=None)
    _stand_in("functa.data_utils")
    sys.path.insert(0, str(peers))
    from functa import function_reps
    from functa.experiment_meta_learning import Experiment

    experiment = Experiment.__new__(Experiment)
    model = {
        "type": "latent_modulated_siren",
        "width": s.width,
        "depth": s.depth,
        "latent_dim": s.latent,
        "w0": s.w0,
        "modulate_scale": False,
        "modulate_shift": True,
        "l2_weight": 0.0,
        "noise_std": 0.0,
        "layer_sizes": (),
        "latent_init_scale": 0.0,
        "use_meta_sgd": True,
        "meta_sgd_init_range": (0.005, 0.1),
        "meta_sgd_clip_range": (0.0, 1.0),
    }
    experiment.config = SimpleNamespace(
        model=SimpleNamespace(**model),
        dataset=SimpleNamespace(type="image", num_channels=s.channels),
        training=SimpleNamespace(inner_steps=s.inner_steps, coord_noise=False),
    )
    experiment.forward = hk.without_apply_rng(hk.transform(experiment._forward_fn))
    experiment._opt_inner = optax.sgd(1e-2)
    experiment._opt_outer = optax.adam(3e-6)

    grid = function_reps.get_coordinate_grid(s.size)
    params = experiment.forward.init(jax.random.PRNGKey(0), grid)
    optimizer_state = experiment._opt_outer.init(function_reps.partition_params(params)[0])
    images = jax.random.uniform(jax.random.PRNGKey(1), (1, s.batch, s.size, s.size, s.channels))
    coords = jnp.broadcast_to(grid, (1, s.batch, *grid.shape))
    rng = jax.random.PRNGKey(2)[None]
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], (params, optimizer_state))

    def update(params, optimizer_state, images, coords, rng):
        *state, scalars = experiment._update_func(params, optimizer_state, images, coords, rng)
        return state, scalars if log_psnr else ()

    step = jax.pmap(update, axis_name="i", devices=jax.devices()[:1])
    for _ in clock:
        state, scalars = step(*state, images, coords, rng)
        jax.block_until_ready((state, scalars))


def coinpp(clock: Iterator[None], peers: Path, s: Setting) -> None:
    """COIN++: `metalearning.outer_step`, backward and Adam; SGD inside, second order, no checkpointing."""
    import torch

    sys.path.insert(0, str(peers / "coinpp"))
    from coinpp.conversion import Converter
    from coinpp.metalearning import outer_step
    from coinpp.models import ModulatedSiren

    model = ModulatedSiren(
        2, s.width, s.channels, s.depth, w0=s.w0, w0_initial=s.w0, use_latent=True, latent_dim=s.latent
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-6)
    coords, features = Converter("image").to_coordinates_and_features(torch.rand(s.batch, s.channels, s.size, s.size))
    for _ in clock:
        outputs = outer_step(model, coords, features, inner_steps=s.inner_steps, inner_lr=1e-2, is_train=True)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        outputs["loss"].item()


def medfuncta(clock: Iterator[None], peers: Path, s: Setting) -> None:
    """MedFuncta: `train.maml_boot.train_step` on all points; SGD inside, second order, clipping and AdamW."""
    import torch

    _stand_in("torch.utils.tensorboard", SummaryWriter=None)
    sys.path.insert(0, str(peers / "medfuncta"))
    from common.utils import MetricLogger
    from models.inrs import LatentModulatedSIREN
    from models.model_wrapper import ModelWrapper
    from train.maml_boot import train_step

    args = SimpleNamespace(
        data_type="img",
        data_size=(s.channels, s.size, s.size),
        in_size=2,
        out_size=s.channels,
        device=torch.device("cpu"),
        inner_lr=1e-2,
        inner_steps=s.inner_steps,
        sample_type="none",
        inner_lr_boot=1e-2,
        inner_steps_boot=0,
        lam=0.0,
        print_step=sys.maxsize,
    )
    net = LatentModulatedSIREN(2, s.channels, s.width, s.depth, latent_modulation_dim=s.latent, w0=s.w0)
    net.modulations = torch.zeros(s.batch, s.latent, requires_grad=True)
    model = ModelWrapper(args, net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6)
    images = torch.rand(s.batch, s.channels, s.size, s.size)
    torch.cuda.synchronize = lambda: None  # the step ends with it, GPU or not
    metrics = MetricLogger()
    for step, _ in enumerate(clock, start=1):
        train_step(args, step, model, optimizer, images, metrics, None)


def report_a(clock: Iterator[None], peers: Path, s: Setting, meta_sgd: bool = False) -> None:
    """Functa-Experiment: its whole loop `meta_learning` (or `meta_sgd_learning`), fed one batch a turn.

    Latents are detached before the outer loss, so that the weights' gradient is first order. Meta-SGD adds the mean of
    the inner losses, through which the rates are learned.
    """
    import matplotlib
    import torch

    def normalize(mean, std):
        return lambda images: (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    matplotlib.use("agg")
    _stand_in("cv2", PSNR=lambda a, b: 0.0)
    _stand_in("torchvision", transforms=SimpleNamespace(Normalize=normalize))
    sys.path.insert(0, str(peers / "report_a"))
    import model
    import train

    train.device = torch.device("cpu")  # a global that its main program is meant to provide
    batch = torch.rand(s.batch, s.channels, s.size, s.size), None
    train.DataLoader = lambda *_, **__: (batch for _ in clock)
    net = model.LatentModulatedSiren(
        hidden_width=s.width, hidden_depth=s.depth - 1, out_dim=s.channels, latent_dim=s.latent
    )
    shape = {"image_size": (s.size, s.size), "image_channel": s.channels, "inner_num": s.inner_steps}
    with tempfile.TemporaryDirectory() as folder:
        shape["save_path"] = f"{folder}/model"
        if meta_sgd:
            shape["optim_path"] = f"{folder}/optimizer"
        learn = train.meta_sgd_learning if meta_sgd else train.meta_learning
        learn(net, None, 1, s.batch, summary_step=sys.maxsize, **shape)


def spatial_functa(clock: Iterator[None], peers: Path, s: Setting) -> None:
    """spatial_functa: `Trainer.train_step` under pmap; meta-SGD, second order, Adam."""
    import jax

    class Config(SimpleNamespace):
        """As much of ml_collections' ConfigDict as its trainer uses."""

        def get(self, name: str, default: object = None) -> object:
            return getattr(self, name, default)

        def unlock(self) -> None:
            pass

        lock = unlock

    _stand_in("wandb")
    _stand_in("ml_collections")
    _stand_in("ml_collections.config_dict", ConfigDict=Config)
    sys.path.insert(0, str(peers / "spatial_functa"))
    from spatial_functa import SIREN, LatentVector
    from spatial_functa.grad_acc import Batch
    from spatial_functa.trainer import Trainer

    model = SIREN(
        input_dim=s.size**2,
        image_width=s.size,
        image_height=s.size,
        num_layers=s.depth,
        hidden_dim=s.width,
        output_dim=s.channels,
        latent_dim=s.latent,
        latent_spatial_dim=s.grid,
        omega_0=s.w0,
        modulation_hidden_dim=s.width,
        modulation_num_layers=0,
        learn_lrs=True,
        latent_lr_shape=(s.grid, s.grid, 1),
        scale_modulate=False,
        shift_modulate=True,
        interpolation_type="1-NN",
    )
    centres = (jax.numpy.arange(s.size) + 0.5) / s.size
    grid = jax.numpy.stack(jax.numpy.meshgrid(centres, centres), axis=-1)
    batch = Batch(
        inputs=jax.numpy.broadcast_to(grid, (s.batch, *grid.shape)),
        targets=jax.random.uniform(jax.random.PRNGKey(1), (s.batch, s.size, s.size, s.channels)),
        labels=jax.numpy.zeros(s.batch, int),
    )
    config = Config(
        train=Config(
            checkpointing=Config(checkpoint_dir_name="none"),
            num_steps=1,
            log_steps=None,
            inner_learning_rate=1e-2,
            inner_lr_multiplier=1.0,
            inner_steps=s.inner_steps,
        ),
        valid=None,
        dataset=Config(resolution=s.size, num_channels=s.channels),
        model=Config(interpolation_type="1-NN", latent_spatial_dim=s.grid),
        scheduler=Config(lr=3e-6),
    )
    trainer = Trainer(
        model, LatentVector(s.latent, s.grid), batch, config, [batch], [], num_devices=1, experiment_dir=Path()
    )
    batch = trainer.process_batch(batch)
    for _ in clock:
        trainer.state, metrics, images = trainer.train_step(trainer.latent_params, trainer.state, batch)
        jax.block_until_ready((trainer.state, metrics, images))


def matmul(clock: Iterator[None], peers: Path, s: Setting, calls: int = 20) -> None:
    """PyTorch's own float32 matmul at the step's shape, `calls` of them a step."""
    import torch

    x = torch.rand(s.points, s.width)
    weight = torch.rand(s.width, s.width) / s.width
    out = torch.empty_like(x)
    for _ in clock:
        for _ in range(calls):
            torch.mm(x, weight, out=out)


PEERS: dict[str, Callable] = {
    "deepmind": deepmind_functa,
    "deepmind-no-log": functools.partial(deepmind_functa, log_psnr=False),
    "coinpp": coinpp,
    "medfuncta": medfuncta,
    "report-a": report_a,
    "report-a-meta-sgd": functools.partial(report_a, meta_sgd=True),
    "spatial-functa": spatial_functa,
    "matmul": matmul,
    "score-px": functools.partial(px_code.score, criterion="PX"),
    "score-snip": functools.partial(px_code.score, criterion="SNIP"),
    "score-grasp": functools.partial(px_code.score, criterion="GraSP"),
}

if __name__ == "__main__":
    name, folder, setting = sys.argv[1:]
    clock = time.process_time if name.startswith("score") else time.perf_counter
    PEERS[name](turns(clock), Path(folder).resolve(), Setting(**json.loads(setting)))
