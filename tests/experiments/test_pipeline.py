"""The host pipeline: the same batches whatever the start, the block size and the number of processes."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.pipeline import host_batches

COUNT = 23


def arrays(count=COUNT):
    return {"image": np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3, 1), "index": np.arange(count)}


def take(number, source=None, **arguments):
    settings = {"batch_size": 4, "seed": 3, "start_step": 0, "steps_per_call": 1} | arguments
    blocks = host_batches(arrays() if source is None else source, **settings)
    try:
        return list(itertools.islice(blocks, number))
    finally:
        blocks.close()


def steps(blocks):
    return np.concatenate([block["index"] for block in blocks])


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "host_batches"]


def test_blocks_have_their_shapes_and_hold_what_belongs_together():
    (first, second) = take(2, steps_per_call=3)
    for block in (first, second):
        assert block["image"].shape == (3, 4, 2, 3, 1)
        assert block["image"].dtype == np.uint8
        np.testing.assert_array_equal(block["image"], arrays()["image"][block["index"]])


def test_epochs_are_philox_permutations_without_their_remainder():
    found = steps(take(15))  # 5 steps an epoch
    for epoch in range(3):
        expected = np.random.Generator(np.random.Philox(key=[3, epoch])).permutation(COUNT)
        np.testing.assert_array_equal(found[5 * epoch :][:5].ravel(), expected[:20])
    assert len(np.unique(found[:5])) == 20


@settings(derandomize=True, max_examples=15, deadline=None)
@given(start=st.integers(0, 30), size=st.integers(1, 7), processes=st.sampled_from([1, 2, 4]))
def test_batches_depend_on_seed_and_step_alone(start, size, processes):
    whole = steps(take(45))
    parts = [
        steps(take(2, start_step=start, steps_per_call=size, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[start:][: 2 * size])


def test_seeds_differ():
    assert not np.array_equal(steps(take(5)), steps(take(5, seed=4)))


def test_memory_mapped_arrays(tmp_path):
    np.save(tmp_path / "image.npy", arrays()["image"])
    source = {"image": np.load(tmp_path / "image.npy", mmap_mode="r"), "index": arrays()["index"]}
    for mapped, plain in zip(take(6, source), take(6), strict=True):
        assert type(mapped["image"]) is np.ndarray
        np.testing.assert_array_equal(mapped["image"], plain["image"])


class Recorded:
    """An array that counts how often it was read, and fails at the given read."""

    def __init__(self, fails_at=None):
        self.reads, self.fails_at = 0, fails_at

    def __len__(self):
        return COUNT

    def __getitem__(self, indices):
        self.reads += 1
        if self.reads == self.fails_at:
            raise OSError("the disk is gone")
        return np.asarray(indices)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_blocks_are_made_ahead_but_not_without_end():
    source = Recorded()
    blocks = host_batches({"index": source}, batch_size=4, seed=0, start_step=0, steps_per_call=1)
    next(blocks)
    wait_until(lambda: source.reads == 4)  # the one taken, two in the queue and one waiting for a place there
    time.sleep(0.15)
    assert source.reads == 4
    blocks.close()
    assert not threads()


def test_an_exception_reaches_the_consumer_after_the_good_blocks():
    blocks = host_batches({"index": Recorded(fails_at=3)}, batch_size=4, seed=0, start_step=0, steps_per_call=1)
    assert len([next(blocks), next(blocks)]) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(blocks)
    assert not threads()
    with pytest.raises(StopIteration):
        next(blocks)


@pytest.mark.parametrize("end", ["close", "drop", "break", "never started"])
def test_the_thread_ends_with_the_iterator(end):
    blocks = host_batches(arrays(), batch_size=4, seed=0, start_step=0, steps_per_call=1)
    if end == "close":
        next(blocks)
        blocks.close()
    elif end == "break":
        for _ in blocks:
            break
    elif end == "drop":
        next(blocks)
    del blocks
    wait_until(lambda: not threads())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 24}, r"batch_size must be in 1\.\.23"),
        ({"batch_size": 0}, r"batch_size must be in 1\.\.23"),
        ({"process_count": 3}, "batch_size 4 must be a multiple of process_count, got 3"),
        ({"process_count": 0}, "multiple of process_count, got 0"),
        ({"process_count": 2, "process_index": 2}, r"process_index must be in 0\.\.1, got 2"),
        ({"start_step": -1}, "start_step must be >= 0"),
        ({"seed": -1}, "seed and start_step must be >= 0"),
        ({"steps_per_call": 0}, "steps_per_call >= 1"),
        (
            {"source": {"image": np.zeros(4), "index": np.zeros(5)}},
            "one length in common, got {'image': 4, 'index': 5}",
        ),
        ({"source": {}}, "one length in common"),
    ],
)
def test_wrong_arguments_are_errors_before_the_first_block(wrong, message):
    with pytest.raises(ValueError, match=message):
        host_batches(
            wrong.pop("source", arrays()),
            **({"batch_size": 4, "seed": 0, "start_step": 0, "steps_per_call": 1} | wrong),
        )
