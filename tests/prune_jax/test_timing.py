"""Measured times: what is timed and what is not, and ratios of functions that take turns."""

import jax
import jax.numpy as jnp
import pytest

from prune_jax import latencies, latency, speed_up


def test_latency_measures_calls_and_compilation():
    calls = []

    def slow(x):
        jax.debug.callback(lambda: calls.append(1))
        return x + 1

    times = latency(slow, jnp.ones(3), repeats=4, warmup=2)
    jax.effects_barrier()
    assert len(calls) == 6
    assert len(times.seconds) == 4
    assert min(times.seconds) <= times.low <= times.median <= times.high <= max(times.seconds)
    assert times.compile > 0
    with pytest.raises(ValueError, match="repeats"):
        latency(slow, 1.0, repeats=0)


def test_a_speed_up_is_taken_within_each_turn() -> None:
    """A machine that becomes ten times slower half-way, in the middle of a turn or between turns, changes little."""
    of = latencies({"a": (lambda x: x, [jnp.ones(2)])}, repeats=5)["a"]
    slow = of._replace(seconds=(2.0, 2.0, 20.0, 20.0, 20.0))
    fast = of._replace(seconds=(1.0, 1.0, 10.0, 10.0, 10.0))
    assert speed_up(slow, fast) == 2.0
    assert speed_up(slow, fast._replace(seconds=(1.0, 10.0, 10.0, 10.0, 10.0))) == 2.0
    with pytest.raises(ValueError, match="as many calls each, got 5 and 2"):
        speed_up(slow, fast._replace(seconds=(1.0, 2.0)))
