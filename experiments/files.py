"""Writing text so that a crash never leaves half a file."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes beside the target, then renames over it: a reader, or a crash, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
