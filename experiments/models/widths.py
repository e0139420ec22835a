"""A structurally pruned CNN as an ordinary module: the widths that a plan of `prune_jax.graph` leaves."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

from experiments.models.lenet import LeNet
from experiments.models.resnet import ResNet
from experiments.models.vgg import VGG
from prune_jax.graph import kept_shapes

CNN = TypeVar("CNN", LeNet, VGG, ResNet)


def narrow_cnn(model: CNN, plan: dict[str, Any]) -> CNN:
    """The module whose variables are those that a plan leaves; `prune_jax.models.narrow` for CNNs.

    Widths say it all. The one place where positions might matter is a shortcut of `ResNet` that is padded with zero
    channels instead of projected: channel k of a stage is added to channel k of the next, so that the two go together,
    what is left of the first stands in front of what is left of the second, and the zeros stay behind.

    Args:
      model: the module that was pruned.
      plan: `prune_jax.graph.prune(apply, variables, images, ...).plan`, where `apply` calls the module.

    Returns:
      A module like `model` with its own width for each layer.

    Raises:
      ValueError: not a plan, or one of another module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from prune_jax.graph import prune
      >>> model, images = VGG(((8,), (4, 6)), hidden=(10,)), jnp.zeros((1, 4, 4, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> small = narrow_cnn(model, prune(model.apply, variables, images, ratio=0.5, scope="local").plan)
      >>> small.configuration, small.hidden
      (((4,), (2, 3)), (5,))
    """
    shapes = kept_shapes(plan)

    def width(*layer: str) -> int:
        path = ("params", *layer, "kernel")
        if path not in shapes:
            raise ValueError(f"plan is not one of this model: it lists no leaf {'/'.join(path)!r}")
        return shapes[path][-1]

    if isinstance(model, LeNet):
        return model.clone(features=(width("conv1"), width("conv2"), width("conv3")), hidden=width("fc1"))
    if isinstance(model, VGG):
        number = itertools.count(1)
        configuration = tuple(tuple(width(f"conv{next(number)}") for _ in block) for block in model.configuration)
        return model.clone(
            configuration=configuration, hidden=tuple(width(f"fc{i + 1}") for i in range(len(model.hidden)))
        )
    widths = tuple(
        tuple(
            tuple(width(f"stage{s + 1}_block{b + 1}", f"conv{i + 1}") for i in range(len(block)))
            for b, block in enumerate(stage)
        )
        for s, stage in enumerate(model.block_widths)
    )
    return model.clone(features=width("conv1"), widths=widths)
