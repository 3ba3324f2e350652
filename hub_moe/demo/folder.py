"""The folder of a run: what lies where, which steps are done, and whether it may be used."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.run_folder import claim_folder, write_atomically
from .plan import CONTRIBUTORS


@dataclass(frozen=True)
class RunFolder:
    """`run.json` (settings) is written first, `report.json` last: where it is, the run is finished."""

    path: Path

    @property
    def settings(self) -> Path:
        """What the run was started with."""
        return self.path / "run.json"

    @property
    def report(self) -> Path:
        """The result."""
        return self.path / "report.json"

    @property
    def steps(self) -> Path:
        """The commands that came to their end, with what they said on stdout."""
        return self.path / "steps.json"

    @property
    def logs(self) -> Path:
        """All that each command said."""
        return self.path / "logs"

    @property
    def hub(self) -> Path:
        """Everything of the embedded Hub."""
        return self.path / "hub"

    @property
    def home(self) -> Path:
        """HF_HOME of everybody: the cache of their clients."""
        return self.path / "hf_home"

    @property
    def people(self) -> Path:
        """`NAME.env` for each: what to source in a shell to be that person."""
        return self.path / "people"

    @property
    def corpus(self) -> Path:
        """The dataset's files."""
        return self.path / "corpus"

    @property
    def suites(self) -> Path:
        """The suites that are asked, as TOML."""
        return self.path / "suites"

    @property
    def reference(self) -> Path:
        """Python's language reference as rows, for runs of one's own."""
        return self.path / "reference.jsonl"

    @property
    def script(self) -> Path:
        """What somebody runs who knows the model's name."""
        return self.path / "use.py"

    @property
    def base(self) -> Path:
        """The owner's training run, with `model` in it."""
        return self.path / "base"

    @property
    def evals(self) -> Path:
        """The records that the base is published with."""
        return self.path / "evals"

    @property
    def reviews(self) -> Path:
        """The reviews as JSON."""
        return self.path / "reviews"

    @property
    def lineage(self) -> Path:
        """Picture of who made what of what."""
        return self.path / "lineage.png"

    def rows(self, domain: str) -> Path:
        """What a contributor trains on."""
        return self.path / f"{domain}.jsonl"

    def suite(self, name: str) -> Path:
        """One of `suites`."""
        return self.suites / f"{name}.toml"

    def run_settings(self, name: str) -> Path:
        """A training run as `hub-moe train` takes it: "base", or a contributor's."""
        return self.path / f"{name}.toml"

    def person(self, name: str) -> Path:
        """A contributor's training run."""
        return self.path / name

    def inside(self, path: Path) -> str:
        """As it is called by commands, which run in this folder."""
        return path.relative_to(self.path).as_posix()

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.report.exists()

    def write_atomically(self, target: Path, write: Callable[[Path], object]) -> None:
        """Let `write` make a file or folder under a temporary name, then give it its own."""
        write_atomically(target, write)


def open_run_folder(path: Path, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The folder of a new run, or of an earlier one with the same settings; `fresh` removes an earlier one first.

    Raises:
        ConfigError: If the folder holds something else, or a run with other settings.
        CheckpointError: If it cannot be written.
    """
    folder = RunFolder(path)
    claim_folder(
        folder.settings,
        settings,
        read=json.loads,
        write=lambda settings: json.dumps(settings, indent=2, sort_keys=True),
        what="demo run",
        made=_made(folder, settings) if fresh else None,
    )
    return folder


def _made(folder: RunFolder, settings: dict[str, Any]) -> list[Path]:
    """What a run writes beside its settings, the report first."""
    names = ("base", *CONTRIBUTORS)
    runs = [folder.base, *(folder.person(name) for name in CONTRIBUTORS), *map(folder.run_settings, names)]
    rows = [folder.rows(domain["name"]) for domain in settings["plan"]["domains"]]
    folders = [folder.hub, folder.home, folder.people, folder.corpus, folder.suites, folder.evals, folder.reviews]
    return [folder.report, folder.steps, folder.logs, *folders, *runs, *rows, folder.reference, folder.script,
            folder.lineage]  # fmt: skip
