"""Smaller networks cut out of trained classifiers: scores, the cut, recovery, and what they are called with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from experiments import data
from experiments.models.conv import Method
from experiments.models.resnet import ResNet, resnet20
from experiments.models.vgg import VGG, vgg_a
from experiments.models.widths import narrow_cnn
from experiments.trained import Base
from experiments.training import PyTree
from prune_jax.graph import dependency_groups, kept_shapes, squared_magnitude
from prune_jax.models import Swin, ViT, narrow
from prune_jax.scores import taylor

CNNS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet20-half": partial(ResNet, (3, 3, 3), 8),
    "vgg-a": vgg_a,
    "vgg-a-quarter": partial(vgg_a, 0.25),
    "vgg-small": partial(VGG, ((8,), (16, 16)), hidden=(16,)),
}

_BATCH = 64  # images at once for scores and calibration


def computed(model: Any, method: Method) -> Any:
    """The network with its convolutions computed by a method, see `convolve`; one without any as it is."""
    return model.clone(method=method) if hasattr(model, "method") else model


def evaluated(model: Any) -> Callable[[PyTree, Array], Array]:
    """The function of a module's variables and of prepared inputs that is cut."""
    return lambda variables, inputs: model.apply(variables, inputs, train=False)


def cut_model(base: Base, plan: dict[str, Any]) -> Any:
    """The smaller module whose variables are those that a plan leaves."""
    return narrow(base.model, plan) if isinstance(base.model, ViT | Swin) else narrow_cnn(base.model, plan)


def calibration(base: Base, images: int) -> list[tuple[Array, Array]]:
    """The first train images, prepared, and their labels, in batches of one size."""
    size = min(_BATCH, images)
    some = data.Split(base.train.images[:images], base.train.labels[:images])
    starts = range(0, len(some.labels) - size + 1, size)
    return [
        (base.prepare(jnp.asarray(some.images[i : i + size])), jnp.asarray(some.labels[i : i + size])) for i in starts
    ]


def taylor_scores(base: Base, batches: list[tuple[Array, Array]]) -> PyTree:
    """The squared change of the loss when a parameter goes, to first order, summed over batches."""

    def apply(params: PyTree, inputs: Array) -> Array:
        return base.model.apply(base.variables | {"params": params}, inputs, train=False)

    score = jax.jit(lambda inputs, labels: taylor(apply, base.params, inputs, labels, prunable=lambda *_: True))
    total = jax.tree.map(lambda *found: sum(found[1:], found[0]), *[score(*batch) for batch in batches])
    return _of_variables(base, total)


def magnitude_scores(base: Base) -> PyTree:
    """The square of every parameter, which report A's equation 10 sums over a unit."""
    return _of_variables(base, squared_magnitude(base.params))


def _of_variables(base: Base, scores: PyTree) -> PyTree:
    """Scores of the parameters as those of all variables; batch statistics have none."""
    unscored = {name: jax.tree.map(lambda _: None, tree) for name, tree in base.variables.items() if name != "params"}
    return {"params": scores} | unscored


def width_groups(base: Base) -> Any:
    """The coupled groups of the parameters alone, as the group regulariser takes them."""

    def apply(params: PyTree, inputs: Array) -> Array:
        return base.model.apply(base.variables | {"params": params}, inputs, train=False)

    return dependency_groups(apply, base.params, base.prepare(jnp.asarray(base.train.images[:1])))


def kept_widths(plan: dict[str, Any]) -> dict[str, float]:
    """For each kernel, the fraction of its outputs that a plan leaves."""
    left = kept_shapes(plan)
    return {
        "/".join(layer).removeprefix("params/"): left[*layer, name][-1] / leaf["shape"][-1]
        for leaf in plan["leaves"]
        for *layer, name in [leaf["path"]]
        if name == "kernel"
    }


def coupled_layers(base: Base) -> list[dict[str, Any]]:
    """`Groups.table()` of a network like the base's with few layers, so that a figure of it can be read."""
    model = base.model
    if isinstance(model, ViT):
        model = model.clone(depth=2, heads=_first(model.heads), qk_dim=None, v_dim=None, mlp_hidden=None, scale=None)
    elif isinstance(model, Swin):
        heads = tuple(map(_first, model.heads))
        model = model.clone(depths=(1,) * len(model.depths), heads=heads)
    elif isinstance(model, ResNet):
        model = model.clone(blocks=(1, 1))
    example = base.prepare(jnp.asarray(base.train.images[:1]))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), example)
    return dependency_groups(evaluated(model), variables, example).table()


def _first(value: Any) -> Any:
    return value if isinstance(value, int) else value[0]
