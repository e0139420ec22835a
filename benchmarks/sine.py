"""`functa_jax.sine` beside `jnp.sin`, taking turns: wall nanoseconds an element, alone and with its derivative.

    python -m benchmarks.sine [--out FILE.json]

The derivative of a sine is the cosine that every backward pass needs, so that "sin and cos" is what training pays.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

import functa_jax
from benchmarks.provenance import provenance

SINES = {"jnp.sin": jnp.sin, "functa_jax.sine": functa_jax.sine}
SIZES = {"in cache": (2**13, 4096), "out of cache": (2**24, 4)}  # elements, applications a call
W0 = 30.0


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(sine: Callable, times: int, x: jax.Array) -> jax.Array:
    """Apply the sine `times` times, each to the result of the one before it."""
    return jax.lax.fori_loop(0, times, lambda _, x: sine(W0 * x), x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward_and_derivative(sine: Callable, times: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, writing the derivative too."""

    def body(_, carry):
        y, pullback = jax.vjp(sine, W0 * carry[0])
        return y, pullback(jnp.ones_like(y))[0]

    return jax.lax.fori_loop(0, times, body, (x, jnp.zeros_like(x)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    rows = []
    print(f"{'ns an element':28} " + "".join(f"{name:>18}" for name in SINES) + f"{'ratio':>8}")
    for place, (elements, times) in SIZES.items():
        x = jax.random.uniform(jax.random.key(0), (elements,), minval=-1.0, maxval=1.0)
        for what, function in (("sin", forward), ("sin and cos", forward_and_derivative)):
            calls = {name: functools.partial(function, sine, times, x) for name, sine in SINES.items()}
            nanoseconds: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                jax.block_until_ready(call())
            for _ in range(flags.rounds):
                for name, call in calls.items():
                    start = time.perf_counter()
                    jax.block_until_ready(call())
                    nanoseconds[name].append((time.perf_counter() - start) * 1e9 / (elements * times))
            ratio = statistics.median(b / a for a, b in zip(*nanoseconds.values(), strict=True))
            medians = {name: statistics.median(of) for name, of in nanoseconds.items()}
            rows.append({"place": place, "what": what, "ns_per_element": medians, "ratio": ratio})
            print(f"{what + ', ' + place:28} " + "".join(f"{ns:18.3f}" for ns in medians.values()) + f"{ratio:8.2f}")
    if flags.out:
        flags.out.write_text(json.dumps(provenance() | {"device": jax.devices()[0].device_kind, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
