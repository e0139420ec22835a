"""The training loop: many steps a call on the device, sharded over all of them; logged, checkpointed, stoppable."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpoints import Checkpoints
from experiments.logs import Log, Progress
from experiments.pipeline import host_batches
from experiments.runs import Run

PyTree = Any
Batch = Mapping[str, Array]
StepFunction = Callable[[PyTree, Batch, Array], tuple[PyTree, dict[str, Array]]]


class TrainingDiverged(FloatingPointError):
    """A metric or a parameter became NaN or infinite; the message names step and metric."""


class Stopped(SystemExit):
    """The run was asked to stop by a signal, and its state is saved; the exit code is 128 + signal."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train, and how often to do what; all counted in steps.

    Attributes:
      steps: total number.
      batch_size: examples a step, over all devices and processes.
      steps_per_call: steps in one call of the compiled loop; the others are multiples of it.
      evaluate_every: between evaluations.
      checkpoint_every: between checkpoints; one is written at every evaluation and at the end too.
      host_data: feed batches from the host, for data that does not fit on the device.
      evaluate_early: evaluate also after 1, 2, 4 ... calls until the first regular evaluation: most happens early.
    """

    steps: int
    batch_size: int
    steps_per_call: int
    evaluate_every: int
    checkpoint_every: int
    host_data: bool = False
    evaluate_early: bool = False

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after that step."""
        calls = step // self.steps_per_call
        early = self.evaluate_early and step < self.evaluate_every and calls & (calls - 1) == 0
        return early or step % self.evaluate_every == 0 or step == self.steps

    def check(self, examples: int, devices: int) -> None:
        """Raises ValueError for numbers that do not fit together."""
        for name in ("steps", "batch_size", "steps_per_call", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value % self.steps_per_call:
                near = max(1, round(value / self.steps_per_call)) * self.steps_per_call
                raise ValueError(
                    f"{name}={value} is not a multiple of steps_per_call={self.steps_per_call}; try {near}"
                )
        if self.batch_size > examples:
            raise ValueError(f"batch_size={self.batch_size} is more than the {examples} examples there are")
        if self.batch_size % devices:
            near = max(1, round(self.batch_size / devices)) * devices
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {devices} devices; try {near}")


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies host arrays, the same in every process, to all devices of the mesh."""
    sharding = NamedSharding(mesh, P())

    def put(x: Any) -> Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fit(
    run: Run,
    step_fn: StepFunction,
    state: PyTree,
    data: Mapping[str, np.ndarray],
    plan: Plan,
    *,
    seed: int,
    mesh: Mesh,
    evaluate: Callable[[PyTree, int, Log], dict[str, float]] | None = None,
    best_metric: str | None = None,
) -> tuple[PyTree, dict[str, float]]:
    """Trains from the newest checkpoint of the run, or from `state`, to `plan.steps`.

    The training depends on `seed` and the global batch alone: not on interruptions, nor, but for rounding, on the
    number of devices and processes.

    Args:
      run: folder, console and options.
      step_fn: (state, batch, key) -> (state, scalar metrics), pure; the batch has the names of `data` and is sharded
        over the mesh along its first axis.
      state: pytree of arrays to start from, the same in every process.
      data: name -> (N, ...); visited in a new random order every epoch, the remainder dropped.
      plan: how long and how often.
      seed: of the order of the data and of the keys given to `step_fn`.
      mesh: devices, along one axis `data`.
      evaluate: (state, step, log) -> metrics, called after every step that `plan.evaluates`.
      best_metric: name of the metric of `evaluate` whose largest value marks the best checkpoint.

    Returns:
      The final state, and {"train_seconds": time spent in steps, over all sessions, "compile_seconds": of this one}.

    Raises:
      ValueError: a plan that does not fit the data or the devices.
      TrainingDiverged: NaN or infinity; the last good checkpoint is kept.
      CheckpointError: a checkpoint cannot be written, or all are damaged.
      Stopped: SIGTERM or Ctrl-C arrived; the state is saved.
    """
    lengths = {name: len(array) for name, array in data.items()}
    examples = next(iter(lengths.values()))
    if set(lengths.values()) != {examples}:
        raise ValueError(f"the arrays of data must have one length in common, got {lengths}")
    plan.check(examples, jax.device_count())
    if best_metric is not None and evaluate is None:
        raise ValueError(f"best_metric={best_metric!r} needs evaluate, which measures it")

    def say(text: str, style: str | None = None) -> None:
        run.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    compile_seconds, ready = 0.0, {}  # ready: the loop compiled for a number of steps; the last call may be shorter
    late: tuple[int, Mapping[str, Array]] | None = None  # metrics of the call before, fetched while the next one runs
    shown: dict[str, float] = {}

    def fetch() -> None:
        nonlocal late
        if late is not None:
            (first, metrics), late = late, None
            _record(log, first, jax.device_get(metrics), shown)

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(
            run.directory / "checkpoints", best_metric=best_metric, warn=lambda text: say(text, style="red")
        )
        stack.enter_context(_naming_last_good(checkpoints))
        stack.callback(checkpoints.close)
        state = replicate(state, mesh)
        step, seconds = 0, 0.0
        restored = checkpoints.restore(state)
        if restored is not None:
            step, state, extra = restored
            seconds = extra["train_seconds"]
            say(f"resuming at step {step} of {plan.steps}")
        log = Log(run.directory, step, tensorboard=run.options.tensorboard, enabled=run.first_process)
        stack.callback(log.close)
        feed = stack.enter_context(contextlib.closing(_feed(data, plan, seed, step, mesh)))
        advance = _compile(step_fn, plan, mesh, examples)
        stop = stack.enter_context(_stop_signals())
        progress = stack.enter_context(Progress(run.console, plan.steps, step, f"{run.study} {run.preset}"))
        while step < plan.steps:
            count = min(plan.steps_per_call - step % plan.steps_per_call, plan.steps - step)
            arguments = (state, next(feed), jax.random.key(seed), np.int32(step))
            if count not in ready:
                begun = time.monotonic()
                ready[count] = advance.lower(*arguments, count=count).compile()
                compile_seconds += time.monotonic() - begun
                progress.start_clock(step)
            begun = time.monotonic()
            state, metrics = ready[count](*arguments)
            fetch()
            late = (step, metrics)
            step += count
            evaluating = plan.evaluates(step)
            saving = evaluating or step % plan.checkpoint_every == 0 or _anywhere(bool(stop), after=state)
            if saving:
                fetch()
                jax.block_until_ready(state)
            seconds += time.monotonic() - begun
            progress.update(step, shown)
            if saving:
                _check_finite(state, step)
                measured = evaluate(state, step, log) if evaluate and evaluating else None
                if measured is not None:
                    _check_measured(step, measured, best_metric)
                    log.scalars(step, measured)
                    shown.update(measured)
                    progress.update(step, shown)
                checkpoints.save(step, state, metrics=measured, extra={"train_seconds": seconds})
                if _anywhere(bool(stop), after=state):
                    checkpoints.wait()
                    say(f"stopped at step {step} of {plan.steps}, all saved. To go on: {run.command}")
                    raise Stopped(128 + (stop[0] if stop else signal.SIGTERM))
        checkpoints.wait()
    return state, {"train_seconds": seconds, "compile_seconds": compile_seconds}


def _compile(step_fn: StepFunction, plan: Plan, mesh: Mesh, examples: int) -> Any:
    """The loop over many steps as one jitted function (state, source, key, first step, *, count)."""
    steps_per_epoch = examples // plan.batch_size

    def sharded(x: Array) -> Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P("data", *[None] * (x.ndim - 1))))

    def from_host(state: PyTree, blocks: Batch, key: Array, first: Array, *, count: int) -> Any:
        def body(state: PyTree, now: tuple[Array, Batch]) -> tuple[PyTree, dict[str, Array]]:
            step, batch = now
            return step_fn(state, batch, jax.random.fold_in(key, step))

        blocks = {name: block[:count] for name, block in blocks.items()}
        return _scan(body, state, (first + jnp.arange(count, dtype=jnp.int32), blocks), count)

    def from_device(state: PyTree, arrays: Batch, key: Array, first: Array, *, count: int) -> Any:
        order_key, step_key = jax.random.split(key)

        def order_of(epoch: Array) -> Array:
            return jax.random.permutation(jax.random.fold_in(order_key, epoch), examples)

        def body(carry: tuple[PyTree, Array], step: Array) -> tuple[tuple[PyTree, Array], dict[str, Array]]:
            state, order = carry
            epoch, position = step // steps_per_epoch, step % steps_per_epoch
            order = lax.cond(position == 0, lambda: order_of(epoch), lambda: order)
            index = lax.dynamic_slice(order, (position * plan.batch_size,), (plan.batch_size,))
            batch = {name: sharded(array[index]) for name, array in arrays.items()}
            state, metrics = step_fn(state, batch, jax.random.fold_in(step_key, step))
            return (state, order), metrics

        steps = first + jnp.arange(count, dtype=jnp.int32)
        (state, _), metrics = _scan(body, (state, order_of(first // steps_per_epoch)), steps, count)
        return state, metrics

    everywhere = NamedSharding(mesh, P())
    return jax.jit(
        from_host if plan.host_data else from_device,
        donate_argnums=0,
        static_argnames="count",
        out_shardings=(everywhere, everywhere),
    )


def _scan(body: Callable[[PyTree, Any], tuple[PyTree, PyTree]], carry: PyTree, xs: PyTree, count: int) -> Any:
    """`lax.scan`, without a loop where there is one step: XLA's convolutions are slow in loops on a CPU."""
    if count > 1:
        return lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y)


def _feed(data: Mapping[str, np.ndarray], plan: Plan, seed: int, step: int, mesh: Mesh) -> Generator[Batch, None, None]:
    """What each call takes its batches from: the whole data on the device, or the next block from the host."""
    if not plan.host_data:
        arrays = replicate(dict(data), mesh)
        while True:
            yield arrays
    blocks = host_batches(
        data,
        batch_size=plan.batch_size,
        seed=seed,
        start_step=step,
        steps_per_call=plan.steps_per_call,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    sharding = NamedSharding(mesh, P(None, "data"))
    with contextlib.closing(blocks):
        for block in blocks:
            yield {name: jax.make_array_from_process_local_data(sharding, array) for name, array in block.items()}


def _record(log: Log, first: int, metrics: dict[str, np.ndarray], shown: dict[str, float]) -> None:
    """Logs the mean over one call, under the step it ended at; raises at the first step that is not finite.

    Steps are counted as everywhere: step 1 is the first one, and metrics logged at step n belong to the state after n.
    """
    if not metrics:
        return
    count = len(next(iter(metrics.values())))
    finite = {name: np.isfinite(values) for name, values in metrics.items()}
    bad = [(int(np.argmin(ok)), name) for name, ok in finite.items() if not ok.all()]
    if bad:
        offset, name = min(bad)
        raise TrainingDiverged(f"step {first + offset + 1}: {name} is {metrics[name][offset]}")
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in metrics.items()}
    log.scalars(first + count, means)
    shown.update(means)


@contextlib.contextmanager
def _naming_last_good(checkpoints: Checkpoints) -> Iterator[None]:
    try:
        yield
    except TrainingDiverged as error:
        steps = checkpoints.steps()
        kept = f"the last good checkpoint, step {steps[-1]}, is kept" if steps else "there was no checkpoint yet"
        raise TrainingDiverged(f"{error}; {kept} in {checkpoints.directory}") from None


def _check_measured(step: int, metrics: Mapping[str, float], best_metric: str | None) -> None:
    if best_metric is not None and best_metric not in metrics:
        raise ValueError(f"best_metric={best_metric!r} is not among the metrics of evaluate: {', '.join(metrics)}")
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise TrainingDiverged(f"step {step}: {name} is {value}")


@partial(jax.jit, static_argnames="names")
def _finite(leaves: list[Array], names: tuple[str, ...]) -> dict[str, Array]:
    return {name: jnp.all(jnp.isfinite(leaf)) for name, leaf in zip(names, leaves, strict=True)}


def _check_finite(state: PyTree, step: int) -> None:
    """Raises if the state is not fit to be saved."""
    named = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_finite([leaf for _, leaf in named], tuple(name for name, _ in named)))
    bad = [name for name, ok in finite.items() if not ok]
    if bad:
        raise TrainingDiverged(f"step {step}: state{bad[0]} has NaN or infinite values")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C in a list instead of dying; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not set from Python


def _anywhere(condition: bool, after: PyTree) -> bool:
    """Whether the condition holds in any process; all must ask."""
    if jax.process_count() == 1:
        return condition
    jax.block_until_ready(after)  # processes on CPU must not have two collectives in flight
    return bool(multihost_utils.process_allgather(np.array(condition)).any())
