"""The original files of a data set: downloaded or found in a directory, and only ever used with the right SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from experiments.shards import DamagedDataError

_CHUNK = 1 << 18
_TIMEOUT = 30  # seconds without a byte from the server


class DownloadError(OSError):
    """A download did not complete; the message says how to go on."""


@dataclass(frozen=True)
class Original:
    """An original file as TFDS registers it: SHA-256 in hex, size in bytes, and TFDS's own name for the download."""

    url: str
    size: int
    sha256: str
    tfds_name: str

    @property
    def name(self) -> str:
        """The file's own name, the last part of its address."""
        return self.url.rsplit("/", 1)[-1]


def collect(originals: list[Original], directory: Path) -> dict[str, Path]:
    """Finds all originals in a directory and checks them."""
    found = {}
    for original in originals:
        for name in (original.tfds_name, original.name):
            if (directory / name).is_file():
                found[original.name] = directory / name
    if missing := [original for original in originals if original.name not in found]:
        lines = "\n".join(f"  {original.name}  from {original.url}" for original in missing)
        raise FileNotFoundError(f"{directory} lacks these files (their names must be kept):\n{lines}")
    for original in originals:
        _check(original, found[original.name])
    return found


def _check(original: Original, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != original.sha256:
        raise DamagedDataError(
            f"{path} is not the original from {original.url}:\n"
            f"  SHA-256 expected {original.sha256} ({original.size:,} bytes)\n"
            f"  SHA-256 found    {digest} ({path.stat().st_size:,} bytes)"
        )


def download(original: Original, directory: Path) -> Path:
    """Downloads an original into `directory`, going on from an interrupted download, and checks it."""
    part = directory / f"{original.name}.part"
    try:
        _fetch(original, part)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"download of {original.url} stopped: {error}\n"
            "The same command goes on from here. Without network, download the file by hand and give its directory as "
            "--from-archives DIR."
        ) from error
    try:
        _check(original, part)
    except DamagedDataError:
        part.unlink()  # going on from wrong bytes would never end well
        raise
    return part


def _fetch(original: Original, part: Path) -> None:
    """Completes `part` through HTTP; a server that does not know ranges sends the whole file again."""
    have = part.stat().st_size if part.exists() else 0
    if have > original.size:
        part.unlink()
        have = 0
    if have == original.size:
        return
    request = urllib.request.Request(original.url, headers={"Range": f"bytes={have}-"} if have else {})
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT) as response,
        Progress("{task.description}", *columns) as progress,
    ):
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
        task = progress.add_task(original.name, total=original.size, completed=have)
        with part.open("ab" if have else "wb") as file:
            while have <= original.size and (chunk := response.read(_CHUNK)):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if have < original.size:
        raise OSError(f"the server closed the connection after {have:,} of {original.size:,} bytes")
