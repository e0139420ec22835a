"""Float32 at least, for what half precision would round away or overflow."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array


def wide_dtype(x: Array) -> Any:
    """Return float32, or the dtype of `x` where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: Array) -> Array:
    """Return x in float32 at least."""
    return x.astype(wide_dtype(x))
