"""A pytest fixture `hub`: a real Hub on a free port, with users alice and bob, for any project's tests.

The client of the Hub reads HF_ENDPOINT once, when it is imported. Tests that use it in this process pass
`endpoint=hub.url` to `HfApi`; steps that cannot run in a process of their own, by `hub.run_python`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_READY = "export HF_ENDPOINT="


@dataclass
class Hub:
    """A running Hub: its address, its folder, and the tokens of its users."""

    root: Path
    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    _process: "subprocess.Popen[str] | None" = None

    def start(self) -> None:
        """Start the server in a process of its own and wait until it answers."""
        command = [sys.executable, "-m", "hub_moe.hubserver", str(self.root), *self.options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(_READY):
            self.stop()
            raise RuntimeError(f"The Hub did not start: {line!r}")
        self.url = line.removeprefix(_READY).strip()

    def stop(self) -> None:
        """Stop the server and wait for its end."""
        self._end("terminate")

    def kill(self) -> None:
        """Kill the server as a power cut would."""
        self._end("kill")

    def environment(self, user: str | None = "alice", *, xet: bool = False, home: Path | None = None) -> dict[str, str]:
        """The environment in which a client talks to this Hub as `user` (None: nobody)."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home or self.root.parent / "hf_home")}
        kept |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        kept |= {"DISABLE_SAFETENSORS_CONVERSION": "1", "OMP_NUM_THREADS": "1"}
        kept |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        return kept | ({"HF_TOKEN": self.tokens[user]} if user else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})

    def run_python(self, code: str, *, user: str | None = "alice", xet: bool = False) -> str:
        """What `code` prints in a fresh interpreter whose clients talk to this Hub; RuntimeError if it fails."""
        environment = self.environment(user, xet=xet)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The step failed:\n{done.stderr}")
        return done.stdout

    def _end(self, how: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            getattr(process, how)()
            process.communicate()


def create_hub(root: Path, *, options: tuple[str, ...] = ()) -> Hub:
    """A stopped Hub in `root` with users alice and bob, each with a token that may write."""
    from .store import Store

    hub = Hub(root, options=options)
    with Store(root) as store:
        for user in ("alice", "bob"):
            store.accounts.add_user(user)
            hub.tokens[user] = store.accounts.create_token(user)
        hub.tokens["reader"] = store.accounts.create_token("alice", name="reader", role="read")
    return hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that runs as long as the tests do. Repos stay, so give each test's repos names of their own."""
    hub = create_hub(tmp_path_factory.mktemp("hub") / "root")
    hub.start()
    yield hub
    hub.stop()
