"""How long a function takes, alone or beside others that take turns with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Latency(NamedTuple):
    """Seconds a call takes: median and quartiles over `seconds`, one entry a call; and what compiling took, once."""

    median: float
    low: float
    high: float
    compile: float
    seconds: tuple[float, ...]


def latency(fn: Callable, *args: Any, repeats: int = 20, warmup: int = 3) -> Latency:
    """Measured seconds of ``jax.jit(fn)(*args)``.

    Compiles apart, keeps the arguments on the device, calls ``warmup`` times unmeasured, and waits for each result.
    Nothing is donated. Timings on a machine that does other work are upper bounds.

    Args:
        fn: any JAX function of arrays.
        *args: its arguments.
        repeats: measured calls.
        warmup: calls before them.

    Returns:
        Median, quartiles, seconds of compilation, and every call's seconds.

    Raises:
        ValueError: ``repeats`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> times = latency(lambda x: x @ x, jnp.ones((8, 8)), repeats=5)
        >>> len(times.seconds), times.low <= times.median <= times.high
        (5, True)
    """
    return latencies({"fn": (fn, args)}, repeats=repeats, warmup=warmup)["fn"]


def latencies(
    calls: Mapping[str, tuple[Callable, Sequence[Any]]], *, repeats: int = 20, warmup: int = 3
) -> dict[str, Latency]:
    """As ``latency`` for several functions that take turns, one call each: a machine that drifts does so for all.

    Args:
        calls: name -> function and its arguments.
        repeats: measured calls of each.
        warmup: calls of each before them.

    Returns:
        A ``Latency`` for each name.

    Raises:
        ValueError: ``repeats`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> found = latencies({n: (lambda x: x @ x, [jnp.ones((int(n), int(n)))]) for n in ("8", "64")}, repeats=5)
        >>> sorted(found), len(found["8"].seconds)
        (['64', '8'], 5)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    compiled, compile_seconds = {}, {}
    for name, (fn, args) in calls.items():
        on_device = jax.block_until_ready(jax.device_put(tuple(args)))
        start = time.perf_counter()
        compiled[name] = (jax.jit(fn).lower(*on_device).compile(), on_device)
        compile_seconds[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, (run, args) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, times in seconds.items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
        found[name] = Latency(median, low, high, compile_seconds[name], tuple(times))
    return found


def speed_up(slow: Latency, fast: Latency) -> float:
    """How many times faster one of two functions is that took turns: the median over the turns of their ratio.

    What slows the machine for a while slows both calls of a turn, so that it falls out.

    Args:
        slow: of ``latencies``.
        fast: of the same call of ``latencies``.

    Returns:
        The factor; above 1 where ``fast`` is faster.

    Raises:
        ValueError: not the same number of calls.

    Example:
        >>> slow, fast = (Latency(s, s, s, 0.0, (s, 4 * s)) for s in (3.0, 1.5))
        >>> speed_up(slow, fast)
        2.0
    """
    if len(slow.seconds) != len(fast.seconds):
        raise ValueError(
            f"functions that took turns have as many calls each, got {len(slow.seconds)} and {len(fast.seconds)}"
        )
    return float(np.median(np.divide(slow.seconds, fast.seconds)))
