"""What was measured, when, and on what: the facts that go beside every number."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks.turns import ROOT

PACKAGES = ("jax", "jaxlib", "flax", "optax", "dm-haiku", "numpy", "torch")


def output(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit(folder: Path) -> str:
    """The git commit checked out in a folder, marked `-dirty` if files differ from it."""
    return output("git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance(peers_python: str | None = None) -> dict:
    """Command, time, machine, versions and commit, as JSON-ready values."""
    installed = {d.name: d.version for d in metadata.distributions()}
    record = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "commit": commit(ROOT),
    }
    if peers_python:
        found = json.loads(output(peers_python, "-m", "pip", "list", "--format=json") or "[]")
        record["peers_versions"] = {p["name"]: p["version"] for p in found if p["name"] in PACKAGES}
    return record
