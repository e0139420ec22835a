"""Knowledge distillation: the dense model as the teacher of the pruned one."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def distillation_loss(student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """How far the student's class probabilities are from the teacher's: equation 4 of the reference, as a divergence.

    With p = softmax(teacher / T) and q = softmax(student / T)::

        loss = T^2 sum_c p_c (log p_c - log q_c)

    T^2 keeps the gradient's size alike at all temperatures. No gradient flows to the teacher. As an option of
    fine-tuning, mix it with the loss on labels::

        teacher = dense_fn(dense_params, images)
        loss = (1 - a) * cross_entropy(student, labels) + a * distillation_loss(student, teacher, 2.0).mean()

    Args:
        student_logits: (..., classes).
        teacher_logits: (..., classes).
        temperature: T, above 0; larger shows the student more of the teacher's small probabilities.

    Returns:
        The loss of each example, (...), in nats; 0 where both agree.

    Raises:
        ValueError: Different shapes, or a temperature that is not positive.

    Example:
        >>> logits = jnp.array([[2.0, 0.0, -1.0]])
        >>> distillation_loss(logits, logits), distillation_loss(0 * logits, logits).round(3)
        (Array([0.], dtype=float32), Array([0.574], dtype=float32))

    Reference: Hinton et al. 2015, Distilling the Knowledge in a Neural Network (1503.02531).
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {student_logits.shape} and "
            f"{teacher_logits.shape}"
        )
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    log_q = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
