"""This project's own competitors: the meta-learning step and XLA's bare matmuls at the step's shapes.

Runs as a worker of `functa_step.py`: `python -m benchmarks.ours NAME SETTING-AS-JSON`.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import functa_jax
from benchmarks.turns import Setting, turns


def network(s: Setting) -> tuple[nn.Module, jax.Array, jax.Array]:
    """The network of a setting, its coordinates, and a latent of zeros."""
    kind = functa_jax.SpatialModulatedSiren if s.grid else functa_jax.ModulatedSiren
    model = kind(width=s.width, depth=s.depth, out_features=s.channels, w0=s.w0)
    latent = jnp.zeros((s.grid, s.grid, s.latent) if s.grid else s.latent)
    return model, functa_jax.coordinate_grid((s.size, s.size)).reshape(-1, 2), latent


def functa(clock: Iterator[None], s: Setting, second_order: bool = True) -> None:
    """`meta_step`: gradient of `meta_loss` for weights and meta-SGD rates, and Adam; jitted, state donated."""
    model, coords, latent = network(s)
    optimizer = optax.adam(3e-6)

    def loss(params, coords, targets):
        options = {"steps": s.inner_steps, "learning_rate": params.rates, "second_order": second_order}
        return functa_jax.meta_loss(model.apply, params.model, coords, targets, latent, batched=True, **options)

    step = jax.jit(functa_jax.meta_step(loss, optimizer, microbatch=s.microbatch), donate_argnums=0)
    targets = jax.random.uniform(jax.random.key(1), (s.batch, s.size**2, s.channels))
    state = functa_jax.init_meta(model.init(jax.random.key(0), coords, latent), jnp.full(latent.shape, 1e-2), optimizer)
    for _ in clock:
        state, metrics = step(state, coords, targets)
        jax.block_until_ready((state, metrics))


def fit(clock: Iterator[None], s: Setting) -> None:
    """`fit_images`, as a functaset is made: a batch fitted with meta-SGD rates, nothing learned."""
    model, coords, latent = network(s)
    variables = model.init(jax.random.key(0), coords, latent)
    images = jax.random.uniform(jax.random.key(1), (s.batch, s.size, s.size, s.channels))
    for _ in clock:
        found = functa_jax.fit_images(
            model.apply,
            variables,
            coords,
            images,
            latent,
            steps=s.inner_steps,
            learning_rate=jnp.full(latent.shape, 1e-2),
            block=s.microbatch,
        )
        jax.block_until_ready(found)


def matmul(
    clock: Iterator[None], s: Setting, rows: int | None = None, columns: int | None = None, calls: int = 20
) -> None:
    """`calls` float32 products of (rows, columns) by (columns, columns) a step, each fed by the one before it."""
    rows, columns = rows or s.points, columns or s.width
    x = jax.random.uniform(jax.random.key(0), (rows, columns))
    weight = jax.random.uniform(jax.random.key(1), (columns, columns)) * (2 / columns)
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, calls, lambda _, x: x @ weight, x))
    for _ in clock:
        jax.block_until_ready(chain(x))


def matmul_gradient(clock: Iterator[None], s: Setting, calls: int = 20) -> None:
    """The same count of products of the weight gradient's shape: (width, points) by (points, width)."""
    x = jax.random.uniform(jax.random.key(0), (s.points, s.width))
    y = jax.random.uniform(jax.random.key(1), (s.points, s.width)) / s.points

    def product(_, y):
        return y.at[: s.width].set(x.T @ y)  # a small write in place makes each product wait for the one before it

    chain = jax.jit(lambda y: jax.lax.fori_loop(0, calls, product, y))
    for _ in clock:
        jax.block_until_ready(chain(y))


def score(clock: Iterator[None], s: Setting, criterion: str) -> None:
    """One scoring of ResNet-20, jitted; PX in the network normalised by fixed statistics, the others by the batch."""
    from experiments.models.resnet import resnet20
    from prune_jax import scores

    model = resnet20(projection=True, method="no-loop")
    inputs = jax.random.normal(jax.random.key(1), (s.batch, s.size, s.size, s.channels))
    labels = jnp.arange(s.batch) % 10
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    stats = variables["batch_stats"]

    def logits(params, inputs, train):
        found = model.apply({"params": params, "batch_stats": stats}, inputs, train=train, mutable=["batch_stats"])
        return found[0]

    if criterion == "px":
        call = jax.jit(lambda p, x, y: scores.px(functools.partial(logits, train=False), p, x))
    else:
        call = jax.jit(lambda p, x, y: getattr(scores, criterion)(functools.partial(logits, train=True), p, x, y))
    for _ in clock:
        jax.block_until_ready(call(variables["params"], inputs, labels))


SQUARE = 2048  # side of the large square matrix
OURS: dict[str, Callable] = {
    "second-order": functa,
    "first-order": functools.partial(functa, second_order=False),
    "fit": fit,
    "matmul": matmul,
    "matmul-gradient": matmul_gradient,
    **{f"score-{name}": functools.partial(score, criterion=name) for name in ("px", "snip", "grasp")},
    "matmul-square": functools.partial(matmul, rows=SQUARE, columns=SQUARE, calls=2),
}

if __name__ == "__main__":
    name, setting = sys.argv[1:]
    clock = time.process_time if name.startswith("score") else time.perf_counter
    OURS[name](turns(clock), Setting(**json.loads(setting)))
