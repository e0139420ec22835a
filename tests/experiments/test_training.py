"""The training loop: order of the data, resuming, devices, divergence, stopping."""

import dataclasses
import io
import os
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType
from linear_study import Config, data_of, evaluation_of, initial, plan_of, step_of, train

from experiments import training
from experiments.checkpoints import Checkpoints
from experiments.config import Options
from experiments.logs import read_lines
from experiments.runs import Run
from experiments.training import Plan, Stopped, TrainingDiverged

FEEDS = pytest.mark.parametrize("host_data", [False, True], ids=["device", "host"])


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Programs are shared between these tests, as between the sessions of a run."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run_in(directory, **options):
    console = rich.console.Console(file=io.StringIO(), width=10_000)
    return Run("linear", "tiny", directory, Options(**options), console, ("run", "linear", "tiny"))


def said(run):
    return run.console.file.getvalue()


def logged(directory):
    return (directory / "metrics.jsonl").read_text(), (directory / "images.jsonl").read_text()


def assert_same_run(directory, state, other_directory, other_state):
    """Bit-identical parameters in memory and on disk, and the same log lines."""
    for name in state:
        np.testing.assert_array_equal(np.asarray(state[name]), np.asarray(other_state[name]), err_msg=name)
    assert logged(directory) == logged(other_directory)
    for folder in (directory, other_directory):
        checkpoints = Checkpoints(folder / "checkpoints", best_metric="negative_error")
        step, saved, _ = checkpoints.restore(state)
        best, _ = checkpoints.best(state)
        assert (step, best) == (int(state["count"]), int(state["count"]))
        checkpoints.close()
        for name in state:
            np.testing.assert_array_equal(np.asarray(saved[name]), np.asarray(state[name]), err_msg=name)


@pytest.fixture(scope="module", params=[False, True], ids=["device", "host"])
def uninterrupted(request, tmp_path_factory):
    asked = Config(host_data=request.param)
    directory = tmp_path_factory.mktemp("uninterrupted")
    state, _ = train(asked, run_in(directory))
    return asked, directory, jax.device_get(state)


@FEEDS
@pytest.mark.parametrize("examples", [20, 22])
def test_every_epoch_visits_each_example_once_in_a_new_order(tmp_path, host_data, examples):
    asked = Config(examples=examples, host_data=host_data)
    state, _ = train(asked, run_in(tmp_path))
    epochs = np.asarray(state["history"]).reshape(-1, 20)  # five steps of four
    for seen in epochs:
        assert len(set(seen)) == 20
        assert set(seen) <= set(range(examples))
    assert len({tuple(seen) for seen in epochs}) == len(epochs)
    if examples == 22:  # the two left out are not the same ones for ever
        assert len({frozenset(seen) for seen in epochs}) > 1


@FEEDS
def test_training_does_not_depend_on_steps_per_call(tmp_path, host_data):
    states = []
    for number, per_call in enumerate([1, 5]):  # 13 is no multiple of 5: the last call is shorter
        asked = Config(
            host_data=host_data,
            steps=13,
            steps_per_call=per_call,
            evaluate_every=2 * per_call,
            checkpoint_every=per_call,
        )
        states.append(train(asked, run_in(tmp_path / str(number)))[0])
        lines = read_lines(tmp_path / str(number) / "metrics.jsonl")
        assert {line["step"] for line in lines if "error" in line} == {*range(2 * per_call, 13, 2 * per_call), 13}
        assert int(states[-1]["count"]) == 13
    for other in states[1:]:
        np.testing.assert_array_equal(np.asarray(states[0]["history"]), np.asarray(other["history"]))
        np.testing.assert_allclose(np.asarray(states[0]["weights"]), np.asarray(other["weights"]), rtol=1e-5)


def test_seed_decides_order_and_keys(tmp_path):
    states = [train(Config(seed=seed), run_in(tmp_path / f"{i}"))[0] for i, seed in enumerate([0, 0, 1])]
    first, same, other = (np.asarray(state["weights"]) for state in states)
    assert (first == same).all()
    assert not (first == other).any()
    assert not (np.asarray(states[0]["history"]) == np.asarray(states[2]["history"])).all()
    noise = [line["noise"] for line in read_lines(tmp_path / "0" / "metrics.jsonl") if "noise" in line]
    assert len(set(noise)) == len(noise)


def test_logs_are_means_over_each_call_at_the_step_they_end_at(tmp_path):
    asked = Config(steps_per_call=5)
    train(asked, run_in(tmp_path))
    train(dataclasses.replace(asked, steps_per_call=1), run_in(tmp_path / "each"))
    each = [line["loss"] for line in read_lines(tmp_path / "each" / "metrics.jsonl") if "loss" in line]
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    np.testing.assert_allclose([line["loss"] for line in lines], np.mean(np.reshape(each, (-1, 5)), axis=1), rtol=1e-5)


@pytest.mark.parametrize("at", [20, 40])
def test_resumed_after_a_crash_is_bit_identical(uninterrupted, tmp_path, at):
    """The crash comes during an evaluation: its lines are in the log, its checkpoint is not there."""
    asked, directory, state = uninterrupted
    evaluate = evaluation_of(asked)

    def crash(state, step, log):
        measured = evaluate(state, step, log)
        if step == at:
            raise OSError("power cut")
        return measured

    with pytest.raises(OSError, match="power cut"):
        train(asked, run_in(tmp_path), evaluate=crash)
    assert read_lines(tmp_path / "images.jsonl")[-1]["step"] == at
    again = run_in(tmp_path)
    resumed, _ = train(asked, again)
    assert f"resuming at step {at - 10} of 40" in said(again)
    assert_same_run(tmp_path, resumed, directory, state)


def test_a_finished_training_is_not_repeated(uninterrupted, tmp_path):
    asked, directory, state = uninterrupted
    shutil.copytree(directory, tmp_path / "copy")

    def never(state, step, log):
        raise AssertionError

    again, times = train(asked, run_in(tmp_path / "copy"), evaluate=never)
    assert_same_run(tmp_path / "copy", again, directory, state)
    assert times["train_seconds"] > 0  # of the first session


@pytest.fixture
def signalling(monkeypatch):
    """Makes this process send itself signals as the calls of the given numbers begin, in the next training only."""

    def arm(when):
        feed_of = training._feed

        def feed(*arguments):
            monkeypatch.setattr(training, "_feed", feed_of)
            for call, batch in enumerate(feed_of(*arguments)):
                for number in when.get(call, ()):
                    os.kill(os.getpid(), number)
                yield batch

        monkeypatch.setattr(training, "_feed", feed)

    return arm


@pytest.mark.parametrize(
    ("call", "number"), [(0, signal.SIGTERM), (3, signal.SIGTERM), (4, signal.SIGINT), (7, signal.SIGINT)]
)
def test_stopped_by_a_signal_and_resumed_is_bit_identical(uninterrupted, tmp_path, signalling, call, number):
    asked, directory, state = uninterrupted
    before = signal.getsignal(number)
    run = run_in(tmp_path)
    signalling({call: [number]})
    with pytest.raises(Stopped) as stopped:
        train(asked, run)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    step = 5 * (call + 1)  # the call that the signal came in is finished
    assert f"stopped at step {step} of 40, all saved. To go on: python -m experiments run linear tiny" in said(run)
    again = run_in(tmp_path)
    resumed, _ = train(asked, again)
    assert f"resuming at step {step}" in said(again)
    assert_same_run(tmp_path, resumed, directory, state)


def test_a_second_sigterm_while_saving_is_harmless(uninterrupted, tmp_path, monkeypatch):
    asked, directory, state = uninterrupted
    save = Checkpoints.save

    def interrupted_save(self, *arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted_save)
        with pytest.raises(Stopped) as stopped:
            train(asked, run_in(tmp_path))
    assert stopped.value.code == 143
    resumed, _ = train(asked, run_in(tmp_path))
    assert_same_run(tmp_path, resumed, directory, state)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, signalling):
    signalling({2: [signal.SIGINT, signal.SIGINT]})
    with pytest.raises(KeyboardInterrupt):
        train(Config(), run_in(tmp_path))
    assert int(train(Config(), run_in(tmp_path))[0]["count"]) == 40


@FEEDS
def test_one_device_and_four_train_alike(tmp_path, host_data):
    asked = Config(batch_size=8, host_data=host_data)
    one = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    shards = []

    def spy(state, batch, key):
        jax.debug.inspect_array_sharding(batch["inputs"], callback=shards.append)
        return step_of(asked)(state, batch, key)

    narrow, _ = train(asked, run_in(tmp_path / "one"), mesh=one)
    wide, _ = train(asked, run_in(tmp_path / "four"), step_fn=spy)
    assert {s.shard_shape((8, asked.features)) for s in shards} == {(2, asked.features)}
    np.testing.assert_array_equal(np.asarray(narrow["history"]), np.asarray(wide["history"]))
    np.testing.assert_allclose(np.asarray(narrow["weights"]), np.asarray(wide["weights"]), rtol=1e-5)


def test_a_checkpoint_of_four_devices_goes_on_on_one(tmp_path, signalling):
    asked = Config()
    signalling({2: [signal.SIGTERM]})
    one = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    with pytest.raises(Stopped):
        train(asked, run_in(tmp_path))
    resumed, _ = train(asked, run_in(tmp_path), mesh=one)
    whole, _ = train(asked, run_in(tmp_path / "whole"))
    np.testing.assert_array_equal(np.asarray(resumed["history"]), np.asarray(whole["history"]))
    np.testing.assert_allclose(np.asarray(resumed["weights"]), np.asarray(whole["weights"]), rtol=1e-5)


@pytest.mark.parametrize(
    ("at", "last_good"),
    [(3, "there was no checkpoint yet"), (10, "there was no checkpoint yet"), (28, "step 20, is kept")],
)
def test_nan_in_a_metric_stops_and_names_step_and_metric(tmp_path, at, last_good):
    asked = Config(nan_at=at)
    for _ in range(2):  # again from the last good checkpoint: the same
        with pytest.raises(TrainingDiverged, match=rf"step {at}: loss is nan; .*{last_good}"):
            train(asked, run_in(tmp_path))
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert all(step < at for step in steps)
    assert all(np.isfinite(line["loss"]) for line in read_lines(tmp_path / "metrics.jsonl") if "loss" in line)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_the_state_alone_is_never_saved(tmp_path, bad):
    asked = Config()

    def step(state, batch, key):
        state, _ = step_of(asked)(state, batch, key)
        weights = jnp.where((state["count"] == 13) & (jnp.arange(asked.features) == 2), bad, state["weights"])
        return {**state, "weights": weights}, {}

    with pytest.raises(TrainingDiverged, match=r"step 20: state\['weights'\].*checkpoint, step 10, is kept"):
        train(asked, run_in(tmp_path), step_fn=step)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [10]
    checkpoints.close()


def test_nan_in_an_evaluation_stops(tmp_path):
    def evaluate(state, step, log):
        return {"error": 1.0, "negative_error": np.nan if step == 40 else -1.0}

    with pytest.raises(TrainingDiverged, match=r"step 40: negative_error is nan.*step 30, is kept"):
        train(Config(), run_in(tmp_path), evaluate=evaluate)


def test_metrics_of_a_call_are_fetched_after_the_next_one_is_under_way(tmp_path, monkeypatch):
    """The device always has work while the host waits for numbers."""
    events = []
    compile_of, record = training._compile, training._record

    class Spy:
        def __init__(self, *arguments):
            self._jitted = compile_of(*arguments)

        def lower(self, *arguments, **keywords):
            self._jitted = self._jitted.lower(*arguments, **keywords)
            return self

        def compile(self):
            compiled = self._jitted.compile()

            def call(*arguments):
                events.append(f"call {int(arguments[-1])}")
                return compiled(*arguments)

            return call

    def spy_record(log, first, *rest):
        events.append(f"fetch {first}")
        record(log, first, *rest)

    monkeypatch.setattr(training, "_compile", Spy)
    monkeypatch.setattr(training, "_record", spy_record)
    train(Config(steps=20), run_in(tmp_path), evaluate=None, best_metric=None)
    expected = "call 0, call 5, fetch 0, fetch 5, call 10, call 15, fetch 10, fetch 15"  # checkpoints at 10 and 20
    assert ", ".join(events) == expected


def test_state_is_donated(tmp_path):
    asked = Config()
    mesh = training.data_mesh()
    advance = training._compile(step_of(asked), plan_of(asked), mesh, asked.examples)
    state, data = (training.replicate(tree, mesh) for tree in (initial(asked), data_of(asked)))
    advance(state, data, jax.random.key(0), np.int32(0), count=5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(data))


def test_best_checkpoint_is_the_best_evaluation(tmp_path):
    asked = Config(steps=80, evaluate_every=10, checkpoint_every=5)
    scores = {10: 1.0, 20: 5.0}

    def evaluate(state, step, log):
        return {"score": scores.get(step, 2.0)}

    train(asked, run_in(tmp_path), evaluate=evaluate, best_metric="score")
    checkpoints = Checkpoints(tmp_path / "checkpoints", best_metric="score")
    assert checkpoints.steps() == [20, 70, 75, 80]
    step, state = checkpoints.best(training.replicate(initial(asked), training.data_mesh()))
    assert (step, int(state["count"])) == (20, 20)
    checkpoints.close()


PLAN = Plan(steps=10, batch_size=8, steps_per_call=5, evaluate_every=10, checkpoint_every=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -4}, "batch_size must be at least 1, got -4"),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
        ({"evaluate_every": 12}, "evaluate_every=12 is not a multiple of steps_per_call=5; try 10"),
        ({"checkpoint_every": 1}, "checkpoint_every=1 is not a multiple of steps_per_call=5; try 5"),
        ({"batch_size": 10}, "batch_size=10 is not a multiple of the 4 devices; try 8"),
        ({"batch_size": 104}, "batch_size=104 is more than the 100 examples there are"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes, message):
    PLAN.check(examples=100, devices=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(PLAN, **changes).check(examples=100, devices=4)


def test_early_evaluations_double_until_the_regular_ones():
    regular = dataclasses.replace(PLAN, steps=103, evaluate_every=50)
    early = dataclasses.replace(regular, evaluate_early=True)
    steps = [*range(5, 103, 5), 103]
    assert [step for step in steps if regular.evaluates(step)] == [50, 100, 103]
    assert [step for step in steps if early.evaluates(step)] == [5, 10, 20, 40, 50, 100, 103]


def test_what_cannot_work_is_refused_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="best_metric='negative_error' needs evaluate"):
        train(Config(), run_in(tmp_path), evaluate=None)
    with pytest.raises(ValueError, match="best_metric='psnr' is not among the metrics of evaluate: error"):
        train(Config(), run_in(tmp_path), best_metric="psnr")
    with pytest.raises(ValueError, match=r"one length in common, got \{'a': 8, 'b': 9\}"):
        training.fit(
            run_in(tmp_path), lambda s, b, k: (s, {}), {}, {"a": np.zeros(8), "b": np.zeros(9)}, PLAN, seed=0,
            mesh=training.data_mesh(),
        )  # fmt: skip
