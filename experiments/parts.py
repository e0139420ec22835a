"""A run of many parts, such as one training for each sparsity: a part that is finished is not done again."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from experiments.files import write_atomically
from experiments.runs import Run


def part(run: Run, name: str) -> Run:
    """A part of a run: its own folder inside the run's, for checkpoints and logs; `name` may not hold a slash."""
    return dataclasses.replace(run, directory=run.directory / name, preset=f"{run.preset} {name}")


def recorded(run: Run, name: str, make: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a part, kept as `record.json` in its folder; made only if they are not there.

    Args:
      run: the whole run.
      name: of the part.
      make: takes the part's own run, gives what JSON can hold.
    """
    own = part(run, name)
    kept = own.directory / "record.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    record = make(own)
    if own.first_process:
        write_atomically(kept, json.dumps(record, indent=1) + "\n")
    return record
