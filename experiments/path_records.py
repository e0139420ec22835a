"""What the DessiLBI studies keep of a trained network: accuracies after every cut, kernels and feature maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import classification, cut, training
from experiments.optimizers import is_path
from experiments.path_config import Setting
from optim_jax import restrict_to_support, sparse_params, support_masks
from prune_jax import apply_masks


def record(
    setting: Setting, arm: str, state: classification.State, retraining: cut.Retraining, seed: int
) -> dict[str, Any]:
    """All numbers of one trained network; accuracies in % of the test split."""
    config, params = setting.config, state.params
    images, labels = training.replicate((setting.train.images, setting.train.labels), setting.mesh)

    def masks(layers: list[str], fraction: float) -> Any:
        if is_path(arm):
            return cut.path_cut(params, state.opt_state, layers, fraction)
        return cut.magnitude_cut(params, layers, fraction)

    def after(layers: list[str], fraction: float) -> dict[str, float]:
        keep = masks(layers, fraction)
        retrained = cut.retrain(retraining, state.variables, keep, images, labels, jax.random.key(seed))
        return {
            "fraction": fraction,
            "removed": cut.removed(params, keep),
            "accuracy": setting.percent({**state.variables, "params": apply_masks(params, keep)}),
            "retrained": setting.percent(retrained),
        }

    layers = list(cut.layers_of(params))
    found: dict[str, Any] = {
        "accuracy": 100 * setting.measure(state.variables, setting.test)["accuracy"],
        "cut": {group: [after(group.split("+"), fraction) for fraction in config.fractions] for group in config.prune},
        "each_layer": {},
    }
    if len(layers) <= 12:
        found["each_layer"] = {layer: after([layer], config.each_layer) for layer in layers}
    if config.total is not None:
        largest = config.prune[-1].split("+")
        found["total"] = after(largest, cut.fraction_of_all(params, largest, config.total))
    if is_path(arm):
        sparse = restrict_to_support(params, state.opt_state)
        found["support_accuracy"] = setting.percent({**state.variables, "params": sparse})
        found["support_removed"] = cut.removed(params, support_masks(state.opt_state))
    else:
        found["support_removed"] = cut.removed(params, jax.tree.map(lambda w: w != 0, params))
    return found


def arrays(setting: Setting, arm: str, state: classification.State) -> Mapping[str, np.ndarray]:
    """What the figures show of one network: kernels, and feature maps of the first test image."""
    config = setting.config
    variables = jax.device_get(state.variables)
    kept = {"kernels W": _leaf(variables["params"], config.kernels)}
    if is_path(arm):
        kept["kernels Gamma"] = _leaf(jax.device_get(sparse_params(state.opt_state)), config.kernels)
    image = setting.prepare(jnp.asarray(setting.test.images[:1]))
    features = feature_maps(setting.model, variables, image, config.features)
    return kept | {f"features {layer}": maps[0] for layer, maps in features.items()}


def feature_maps(model: nn.Module, variables: Any, inputs: Array, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """What each of some convolutions gives on to the next: normalised where the network does, shortcut and ReLU too.

    Args:
      model: a network of `experiments.models`.
      variables: its parameters and statistics.
      inputs: prepared, (B, H, W, C).
      layers: such as "conv3" or "stage2_block1/conv2".

    Returns:
      For each layer an array (B, H', W', C').
    """
    places = {layer: _before_relu(variables["params"], layer) for layer in layers}
    _, found = model.apply(
        variables,
        inputs,
        train=False,
        capture_intermediates=lambda module, _: "/".join(module.path) in places.values(),
        mutable=["intermediates"],
    )
    maps = {layer: _node(found["intermediates"], place)["__call__"][0] for layer, place in places.items()}
    return {layer: np.maximum(np.asarray(values), 0) for layer, values in maps.items()}


def _before_relu(params: Any, layer: str) -> str:
    """The module whose output a ReLU takes after a convolution: its normalisation's, or the residual block's."""
    *block, name = layer.split("/")
    beside = _node(params, "/".join(block)) if block else params
    number = int(name.removeprefix("conv"))
    if block and f"conv{number + 1}" not in beside:
        return "/".join(block)
    norm = f"norm{number}"
    return "/".join([*block, norm]) if norm in beside else layer


def _leaf(params: Any, layer: str) -> np.ndarray:
    return np.asarray(_node(params, layer)["kernel"])


def _node(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree
