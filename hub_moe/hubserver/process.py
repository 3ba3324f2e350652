"""The embedded Hub as a process of its own, for whoever needs one for a while: tests, the demo."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_READY = "export HF_ENDPOINT="


@dataclass
class Hub:
    """A Hub that can be started and stopped: its folder, its address, and the tokens of its users."""

    root: Path
    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    _process: "subprocess.Popen[str] | None" = None

    def start(self) -> None:
        """Start the server on a free port and wait until it answers; it ends when this process does.

        Raises:
            RuntimeError: If it does not start; its reason is on stderr.
        """
        command = [sys.executable, "-m", "hub_moe.hubserver", str(self.root), "--until-stdin-closes", *self.options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(_READY):
            self.stop()
            raise RuntimeError(f"The Hub did not start: {line!r}")
        self.url = line.removeprefix(_READY).strip()

    @property
    def pid(self) -> int:
        """The id of the server's process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """Kill the server as a power cut would."""
        self._end(subprocess.Popen.kill)

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        """Started inside the block, stopped after it."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def environment(self, user: str | None = "alice", *, xet: bool = False, home: Path | None = None) -> dict[str, str]:
        """The environment in which a client talks to this Hub as `user` (None: nobody)."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home or self.root.parent / "hf_home")}
        kept |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        kept |= {"DISABLE_SAFETENSORS_CONVERSION": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        kept |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        return kept | ({"HF_TOKEN": self.tokens[user]} if user else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def run_python(self, code: str, *, user: str | None = "alice", xet: bool = False) -> str:
        """What `code` prints in a fresh interpreter whose clients talk to this Hub; RuntimeError if it fails."""
        environment = self.environment(user, xet=xet)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The step failed:\n{done.stderr}")
        return done.stdout

    def _end(self, signal: "Callable[[subprocess.Popen[str]], None]") -> None:
        process, self._process = self._process, None
        if process is not None:
            signal(process)
            process.communicate()
