"""Writing files so that a crash never leaves half a file, and a failure says which one; where caches are."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside the target, then renames over it: a reader, or a crash, never meets half a file.

    Raises:
      OSError: the disk is full, or the directory not writable; names the file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file to an OSError that does not name one, as those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def cache_folder(name: str) -> Path:
    """The folder `name` of this project's caches: in COMPACT_JAX_CACHE, else in the user's cache directory."""
    asked = os.environ.get("COMPACT_JAX_CACHE")
    root = Path(asked) if asked else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "compact-jax"
    return root.expanduser().absolute() / name
