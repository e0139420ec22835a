"""A command in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# A background job of a shell ignores Ctrl-C, and so would the commands that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Command:
    """A started command; `finish()` gives exit code and all that it said."""

    def __init__(self, arguments, env):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.send_signal, self.poll = self._process.send_signal, self._process.poll

    def finish(self, timeout=300):
        with self._process as process:
            try:
                said, _ = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return process.returncode, said
