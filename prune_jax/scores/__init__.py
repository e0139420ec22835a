"""Criteria: how much a weight matters, as a pytree like the parameters; larger = keep, None = not scored."""

from prune_jax.scores.dimap import dimap, dimap_modules, lamp
from prune_jax.scores.grasp import grasp
from prune_jax.scores.magnitude import magnitude
from prune_jax.scores.movement import movement
from prune_jax.scores.px import px
from prune_jax.scores.random import random
from prune_jax.scores.snip import snip
from prune_jax.scores.synflow import synflow
from prune_jax.scores.taylor import taylor

__all__ = [
    "dimap",
    "dimap_modules",
    "grasp",
    "lamp",
    "magnitude",
    "movement",
    "px",
    "random",
    "snip",
    "synflow",
    "taylor",
]
