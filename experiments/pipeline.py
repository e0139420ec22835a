"""Batches from the host, for data sets that do not fit on the device.

Which images a step sees depends on (seed, step) alone, so that a resumed run sees what an uninterrupted one would have
seen, on any number of processes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping

import numpy as np

_PREFETCH = 2  # blocks made ahead of the consumer


def host_batches(
    arrays: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    steps_per_call: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields blocks of K = `steps_per_call` batches for steps start_step, start_step + K, ..., without end.

    Each epoch visits the N examples without replacement, in the order of Philox(key=[seed, epoch]), and drops the
    remainder: floor(N / batch_size) steps an epoch. The next blocks are made in a background thread, which ends when
    the iterator is closed or dropped; an exception in it is raised at the consumer's next block.

    Args:
      arrays: name -> (N, ...); np.memmap is read one block at a time.
      batch_size: B, examples in a step over all processes.
      seed: of the shuffling, >= 0.
      start_step: first step, counted from the start of training.
      steps_per_call: K, steps in a block.
      process_index: which slice of every global batch this process gets.
      process_count: number of processes; divides B.

    Returns:
      Iterator over name -> (K, B / process_count, ...).

    Raises:
      ValueError: arrays of different lengths, or numbers that do not fit together.

    Example:
      >>> import numpy as np
      >>> from experiments.pipeline import host_batches
      >>> arrays = {"image": np.zeros((10, 8, 8, 1), np.uint8), "label": np.arange(10)}
      >>> blocks = host_batches(arrays, batch_size=4, seed=0, start_step=0, steps_per_call=2)
      >>> {name: block.shape for name, block in next(blocks).items()}
      {'image': (2, 4, 8, 8, 1), 'label': (2, 4)}
      >>> blocks.close()
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must have one length in common, got {lengths}")
    (count,) = set(lengths.values())
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be in 1..{count}, the number of examples, got {batch_size}")
    if process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a multiple of process_count, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
    if seed < 0 or start_step < 0 or steps_per_call < 1:
        raise ValueError(
            f"seed and start_step must be >= 0 and steps_per_call >= 1, got {seed}, {start_step}, {steps_per_call}"
        )
    local = batch_size // process_count
    mine = slice(process_index * local, (process_index + 1) * local)
    blocks = _blocks(arrays, count, batch_size, mine, seed, start_step, steps_per_call)
    return _prefetched(blocks)


def _blocks(
    arrays: Mapping[str, np.ndarray], count: int, batch_size: int, mine: slice, seed: int, step: int, steps: int
) -> Iterator[dict[str, np.ndarray]]:
    epoch_steps = count // batch_size
    epoch, order = -1, np.empty(0, int)
    while True:
        chosen = []
        for current in range(step, step + steps):
            if current // epoch_steps != epoch:
                epoch = current // epoch_steps
                order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
            start = current % epoch_steps * batch_size
            chosen.append(order[start : start + batch_size][mine])
        yield {name: array[np.stack(chosen)] for name, array in arrays.items()}
        step += steps


def _prefetched(blocks: Iterator[dict[str, np.ndarray]]) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields what `blocks` yields, made ahead in a thread that starts with the first block asked for."""
    ready: queue.Queue[dict[str, np.ndarray] | BaseException] = queue.Queue(_PREFETCH)
    closed = threading.Event()

    def put(item: dict[str, np.ndarray] | BaseException) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)  # wakes up to see whether the consumer is gone
            except queue.Full:
                pass

    def work() -> None:
        try:
            for block in blocks:
                put(block)
                if closed.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="host_batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
