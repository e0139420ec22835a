"""The default loss of the criteria that need labels."""

from __future__ import annotations

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy of logits (..., classes) and integer labels (...), a scalar in nats."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
