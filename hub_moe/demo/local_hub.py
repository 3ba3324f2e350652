"""The demo's Hub: the text goes through it as a dataset and the finished model as a model, both by name."""

import json
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Corpus, Document
from ..errors import CheckpointError, DatasetError, HubError
from ..hubserver.process import Hub

OWNER = "demo"
CONTRIBUTOR = "contributor"
DATASET = f"{OWNER}/python-stdlib"
MODEL = f"{OWNER}/nano"
PATCH = f"{CONTRIBUTOR}/nano-prose"
_VISITOR = Path(__file__).with_name("visitor.py")
_DATASET_CARD = """
# Python's own standard library

The source files of one Python's standard library, one row a file, without tests, generated tables and installed
packages. `test` holds files that no training run of `hub-moe demo` has seen.

```python
from datasets import load_dataset

files = load_dataset("demo/python-stdlib")
```
"""


@dataclass(frozen=True)
class LocalHub:
    """A running Hub, and a folder for what passes between this process and its clients."""

    hub: Hub
    scratch: Path

    def send_corpus(self, corpus: Corpus) -> tuple[Corpus, str]:
        """Push a corpus as a dataset and load it back by its name; it and its commit.

        Raises:
            DatasetError: If something else came back.
        """
        sent, received = self.scratch / "sent.json", self.scratch / "received.json"
        sent.write_text(json.dumps(_to_splits(corpus)), "utf-8")
        revision = self.run_step("push_dataset", repo=DATASET, splits=str(sent), card=_DATASET_CARD)["revision"]
        self.run_step("load_dataset", user=None, repo=DATASET, revision=revision, splits=str(received))
        loaded = _from_splits(json.loads(received.read_text("utf-8")))
        if loaded.sha256 != corpus.sha256:
            raise DatasetError(f"The dataset {DATASET} came back from the Hub with other text than was pushed.")
        return loaded, revision

    def publish_model(self, folder: Path) -> str:
        """Publish a folder as the demo's model; the commit."""
        return str(self.run_step("publish_model", repo=MODEL, folder=str(folder))["revision"])

    def run_command(self, arguments: list[str], *, user: str | None) -> str:
        """`hub-moe` with `arguments` in a process of its own, as `user` (None: somebody without a token).

        The command is shown, and what it says on stderr; returns its stdout.

        Raises:
            HubError: If it fails.
            KeyboardInterrupt: After Ctrl-C, once it has come to its own end.
        """
        print(f"$ hub-moe {shlex.join(arguments)}", file=sys.stderr)
        command = [sys.executable, "-P", "-m", "hub_moe", *arguments]
        environment = self.hub.environment(user, xet=True, home=self.scratch / "hf_home")
        environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        # a session of its own: Ctrl-C reaches it once, from here
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
        if process.returncode:
            raise HubError(f"hub-moe {arguments[0]} against {self.hub.url} failed; its reason is above.")
        return output

    def run_step(self, step: str, *, user: str | None = OWNER, **values: Any) -> dict[str, Any]:
        """One step of `visitor` in a process of its own, as `user` (None: somebody without a token).

        Raises:
            HubError: If it fails, with its last line.
        """
        command = [sys.executable, "-P", str(_VISITOR), step]
        environment = self.hub.environment(user, xet=True, home=self.scratch / "hf_home")
        environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, input=json.dumps(values), env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise HubError(f"The step {step} against {self.hub.url} failed: {reason}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


@contextmanager
def open_local_hub(root: Path, *, scratch: Path) -> Iterator[LocalHub]:
    """The Hub in `root`, made if need be, running as long as the block does; `scratch` is emptied and removed."""
    from ..hubserver.store import Store

    try:
        with Store(root) as store:
            known = {account["name"] for account in store.accounts.list_all()}
            for user in (OWNER, CONTRIBUTOR):
                if user not in known:
                    store.accounts.add_user(user)
            tokens = {
                user: store.accounts.create_token(user, name="hub-moe demo", replace=True)
                for user in (OWNER, CONTRIBUTOR)
            }
    except sqlite3.OperationalError as error:
        raise CheckpointError(f"Cannot write to {root}: {error}; choose a folder with room.") from error
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        with Hub(root, tokens=tokens).running() as hub:
            yield LocalHub(hub, scratch)
    finally:
        shutil.rmtree(scratch)


def _to_splits(corpus: Corpus) -> dict[str, list[dict[str, str]]]:
    sides = {"train": corpus.train, "test": corpus.held_out}
    return {name: [{"name": one.name, "text": one.text} for one in side] for name, side in sides.items()}


def _from_splits(splits: dict[str, list[dict[str, str]]]) -> Corpus:
    sides = {name: tuple(Document(row["name"], row["text"]) for row in rows) for name, rows in splits.items()}
    return Corpus(train=sides["train"], held_out=sides["test"])
