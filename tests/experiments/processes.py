"""A command in a process of its own."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Command:
    """A started command; `finish()` gives exit code and all that it said."""

    def __init__(self, arguments, env):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.send_signal, self.poll = self._process.send_signal, self._process.poll

    def finish(self, timeout=300):
        try:
            said, _ = self._process.communicate(timeout=timeout)
        finally:
            self._process.kill()
        return self._process.returncode, said
