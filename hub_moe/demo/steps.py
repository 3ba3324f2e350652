"""The demo's commands: each is printed, run once, and remembered."""

import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..errors import HubError
from .folder import RunFolder
from .local_hub import LocalHub

_PEOPLE_AT_ONCE = 2  # of whom each trains on one core
_T = TypeVar("_T")


@dataclass(frozen=True)
class Done:
    """A command that came to its end: who gave it, what it said on stdout, and how long it took."""

    who: str
    command: str
    output: str
    seconds: float

    @property
    def data(self) -> Any:
        """What a command with `--json` said."""
        return json.loads(self.output)


class Steps:
    """Runs commands; those that an earlier call finished are not run again."""

    def __init__(self, hub: LocalHub, folder: RunFolder) -> None:
        self._hub, self._folder = hub, folder
        self._done: dict[str, Done] = {}
        self._count = 0
        self._lock = threading.Lock()
        self._is_stopped = False
        if folder.steps.exists():
            stored = json.loads(folder.steps.read_text("utf-8"))
            self._done = {name: Done(**fields) for name, fields in stored.items()}
        folder.logs.mkdir(exist_ok=True)
        _say(f"The commands run in this folder, each person's own Hub token in HF_TOKEN:\n  $ cd {folder.path}")

    def __getitem__(self, name: str) -> Done:
        return self._done[name]

    @property
    def done(self) -> list[Done]:
        """All, in their order."""
        return list(self._done.values())

    def run(
        self, name: str, who: str | None, title: str, command: list[str], *, expected: Collection[int] = (0,)
    ) -> Done:
        """Print and run a command as `who` (None: somebody without a token), unless `name` is done already.

        Raises:
            HubError: If it ends with an exit code that was not expected.
            KeyboardInterrupt: After Ctrl-C; the same call runs it again.
        """
        person = who or "anybody"
        with self._lock:
            if self._is_stopped:
                raise HubError(f"Not begun: {title}.")
            self._count += 1
            log = self._folder.logs / f"{self._count:02}-{name}.log"
            _say(f"\n[{self._count}] {person}: {title}\n  $ {shlex.join(command)}")
            if name in self._done:
                _say("  done before")
                return self._done[name]
        started_s = time.monotonic()

        def tell_progress(line: str) -> None:
            if line.startswith("step ") and line.endswith("\n"):
                _say(f"  {person}: {line.rstrip()}")

        output = self._hub.run(command, user=who, log=log, expected=expected, hear=tell_progress)
        done = Done(person, shlex.join(command), output, round(time.monotonic() - started_s, 1))
        with self._lock:
            self._done[name] = done
            stored = json.dumps({key: asdict(each) for key, each in self._done.items()}, indent=1, ensure_ascii=False)
            self._folder.write_atomically(self._folder.steps, lambda path: path.write_text(stored, "utf-8"))
        return done

    def run_together(self, *lanes: Callable[[], _T]) -> list[_T]:
        """What each lane, which runs commands, returns; several people work at the same time.

        Raises:
            HubError: If a command of one fails; those of the others come to their end first.
            KeyboardInterrupt: After Ctrl-C, likewise.
        """
        with ThreadPoolExecutor(_PEOPLE_AT_ONCE) as pool:
            running = [pool.submit(lane) for lane in lanes]
            is_done = False
            try:
                results = [each.result() for each in running]
                is_done = True
            finally:
                if not is_done:
                    with self._lock:
                        self._is_stopped = True
                    self._hub.interrupt()
        return results


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
