"""The demo's Hub and the people at it: each command runs in a process of its own, as one of them."""

import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, HubError
from ..hubserver.process import Hub
from .folder import RunFolder
from .plan import PEOPLE

_PROGRAMS = {
    "hub-moe": [sys.executable, "-P", "-m", "hub_moe"],
    "hf": [sys.executable, "-P", "-m", "huggingface_hub.cli.hf"],
    "python": [sys.executable, "-P"],
}
_ADDRESS = "http://127.0.0.1:7860"  # where `hub-moe hub serve` listens unless told otherwise
_QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class LocalHub:
    """A running Hub with its people."""

    hub: Hub
    folder: RunFolder
    _running: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def interrupt(self) -> None:
        """Let every command that runs come to its own end, as Ctrl-C does."""
        for process in list(self._running):
            process.send_signal(signal.SIGINT)

    def run(
        self,
        command: list[str],
        *,
        user: str | None,
        log: Path,
        expected: Collection[int] = (0,),
        hear: Callable[[str], None] = lambda line: None,
    ) -> str:
        """Run a command (`hub-moe`, `hf` or `python` with arguments) in the folder; what it says on stdout.

        Without a `user` it has no token. All that it says goes to `log`; `hear` is told each line of stderr.

        Raises:
            HubError: If it ends with an exit code that was not expected, with the last thing it said.
            KeyboardInterrupt: After Ctrl-C in the main thread, once it has come to its own end.
        """
        environment = self.hub.environment(user, xet=True, home=self.folder.home.resolve()) | _QUIET
        program, *arguments = command
        heard: list[str] = []
        # a session of its own: Ctrl-C reaches it once, from here
        with subprocess.Popen(
            [*_PROGRAMS[program], *arguments],
            env=environment,
            cwd=self.folder.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            self._running.append(process)
            listener = threading.Thread(target=_listen, args=(process, heard, hear))
            listener.start()
            try:
                assert process.stdout is not None
                output = process.stdout.read()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                raise
            finally:
                process.wait()
                self._running.remove(process)
                listener.join()
        log.write_text(f"$ {shlex.join(command)}\n{''.join(heard)}{output}", "utf-8")
        if process.returncode not in expected:
            said = [line.strip() for line in "".join(heard).replace("\r", "\n").splitlines() if line.strip()]
            raise HubError(
                f"{shlex.join(command[:2])} ended with {process.returncode}: {said[-1] if said else 'it said nothing'} "
                f"(all it said is in {log})"
            )
        return output

    def write_people(self) -> None:
        """For each person a file to source in a shell, for the address that `hub-moe hub serve` has by default."""
        self.folder.people.mkdir(exist_ok=True)
        home = self.folder.home.resolve()
        for name, token in self.hub.tokens.items():
            path = self.folder.people / f"{name}.env"
            variables = {"HF_ENDPOINT": _ADDRESS, "HF_TOKEN": token, "HF_HOME": str(home)}
            path.touch(mode=0o600)
            path.write_text("".join(f"export {key}={shlex.quote(text)}\n" for key, text in variables.items()), "utf-8")


@contextmanager
def open_local_hub(folder: RunFolder) -> Iterator[LocalHub]:
    """The Hub in the folder, made if need be, running as long as the block does."""
    from ..hubserver.store import Store

    try:
        with Store(folder.hub) as store:
            known = {account["name"] for account in store.accounts.list_all()}
            for name in PEOPLE:
                if name not in known:
                    store.accounts.add_user(name)
            tokens = {name: store.accounts.create_token(name, name="hub-moe demo", replace=True) for name in PEOPLE}
    except (sqlite3.OperationalError, OSError) as error:
        raise CheckpointError(f"Cannot write to {folder.hub}: {error}; choose a folder with room.") from error
    with Hub(folder.hub, tokens=tokens).running() as hub:
        yield LocalHub(hub, folder)


def page_of(model: str) -> str:
    """The page of a model once `hub-moe hub serve` runs."""
    return f"{_ADDRESS}/{model}"


def _listen(process: "subprocess.Popen[str]", heard: list[str], hear: Callable[[str], None]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        heard.append(line)
        hear(line)
