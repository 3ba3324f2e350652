"""Suites: named lists of evaluation tasks with pinned data, declared in TOML."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError
from ..files.tables import read_table, read_toml
from .records.record import SuiteSource, hash_json

DECLARATIONS = next(
    folder
    for folder in (Path(__file__).parent / "declarations", Path(__file__).parents[2] / "evals")
    if (folder / "suites").is_dir()
)
"""Where `suites/*.toml` and `tasks/` lie: inside an installed package, or beside the package in a checkout."""

LM_EVAL, OWN = "lm_eval", "hub_moe"

_MAX_DOCUMENTS = 10**9


@dataclass(frozen=True)
class SuiteEntry:
    """One line of a suite: a task of lm_eval, or several that count as one.

    Attributes:
        name: What tables call it.
        tasks: Names of tasks, groups or tags in the folder `source`.
        source: Where the task files lie: `lm_eval/FOLDER` inside lm_eval's own tasks, `hub_moe/FOLDER` for those that
            come with hub_moe, `./FOLDER` beside the suite's file.
        num_fewshot: Examples in the prompt; None leaves it to the task. As in lm_eval, a task that sets 0 keeps 0.
        limit: The first documents of the split only, of each task.
        group_column: Column of a document that says which documents belong together. Without one, the documents of
            each task of an entry with several belong together.
        main_metric: The metric that stands for the entry, `exact_match,strict-match` with its filter; chosen by
            `hub_moe.evals.tasks` where it is None.
        datasets: Commit sha by Hub dataset. A dataset that is not named here is resolved when the suite is run.
        needs_data_dir: Whether the entry's documents come from the user's folder only, and from no Hub.
        runs_code: Whether scoring runs code that the model wrote.

    Raises:
        ConfigError: If a number is out of range or the source is none.
    """

    name: str
    tasks: tuple[str, ...]
    source: str
    num_fewshot: int | None = None
    limit: int | None = None
    group_column: str | None = None
    main_metric: str | None = None
    datasets: Mapping[str, str] = field(default_factory=dict)
    needs_data_dir: bool = False
    runs_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"The entry {self.name} names no tasks.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit={self.limit} asks no documents of {self.name}; give 1 or more, or leave it out.")
        if max(self.limit or 0, self.num_fewshot or 0) > _MAX_DOCUMENTS:
            raise ConfigError(f"{self.name} asks for more than {_MAX_DOCUMENTS:,} documents or examples.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot={self.num_fewshot} of {self.name} must be 0 or more.")
        if self.source.split("/")[0] not in (LM_EVAL, OWN, "."):
            raise ConfigError(
                f"The source {self.source!r} of {self.name} must be lm_eval/FOLDER, hub_moe/FOLDER or ./FOLDER."
            )


@dataclass(frozen=True)
class Suite:
    """What to ask a model, and how.

    Attributes:
        chat_template: Whether prompts are written with the tokenizer's chat template.
        fewshot_as_multiturn: With a chat template, whether every example is a turn of its own.
        system_prompt: Before everything else; None for none.
        fewshot_seed: Seed of the choice of examples.
        folder: Where the declaration was read, for sources beside it; no part of what the suite is.

    Raises:
        ConfigError: If it has no entries, or two of one name.
    """

    name: str
    description: str
    entries: tuple[SuiteEntry, ...]
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_prompt: str | None = None
    fewshot_seed: int = 1234
    folder: str = ""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names:
            raise ConfigError(f"The suite {self.name} has no entries.")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigError(f"The suite {self.name} has two entries of the name {twice}.")

    @property
    def source(self) -> SuiteSource:
        """The name, and a hash over all that changes what is asked: two suites with one hash ask the same."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("folder", "description")}
        return SuiteSource(self.name, hash_json(plain), plain)

    @classmethod
    def from_declaration(cls, declaration: Mapping[str, Any], *, folder: str = "") -> Self:
        """The suite that a record declares; `folder` is where sources beside its file lie.

        Raises:
            ConfigError: If it is no suite of this version of hub_moe.
        """
        suite: Self = read_table(cls, {"description": "", **declaration}, where="The suite of the record")
        return replace(suite, folder=folder)


def load_suite(
    name_or_path: str, *, limit: int | None = None, tasks: Sequence[str] = (), num_fewshot: int | None = None
) -> Suite:
    """A suite that comes with hub_moe, or the one in a TOML file, with the user's changes.

    Args:
        limit: For every entry, in place of its own.
        tasks: Keep these entries only, named by entry or task.
        num_fewshot: For every entry, in place of its own.

    Raises:
        ConfigError: If there is no such suite or task (the nearest names are given), or the file is no suite.
    """
    suite = _read_suite(_find_suite(name_or_path))
    if tasks:
        suite = replace(suite, entries=_choose_entries(suite, tasks))
    return replace(suite, entries=tuple(_override(entry, limit, num_fewshot) for entry in suite.entries))


def list_suites() -> list[Suite]:
    """The suites that come with hub_moe, by name."""
    return [_read_suite(path) for path in sorted((DECLARATIONS / "suites").glob("*.toml"))]


def name_nearest(wanted: str, known: Sequence[str], *, what: str) -> str:
    """The end of a sentence about a name that is not known: the nearest, or all."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"{what} are {', '.join(sorted(known))}."


def _find_suite(name_or_path: str) -> Path:
    known = {path.stem: path for path in (DECLARATIONS / "suites").glob("*.toml")}
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise ConfigError(f"There is no suite file {name_or_path}.")
        return path
    raise ConfigError(f"There is no suite {name_or_path!r}; {name_nearest(name_or_path, list(known), what='suites')}")


def _read_suite(path: Path) -> Suite:
    tables = read_toml(path)
    if "folder" in tables:
        raise ConfigError(f"{path} has no key 'folder': it is the folder of the file.")
    suite = read_table(Suite, {"name": path.stem, **tables}, where=str(path))
    return replace(suite, folder=str(path.resolve().parent))


def _override(entry: SuiteEntry, limit: int | None, num_fewshot: int | None) -> SuiteEntry:
    return replace(
        entry,
        limit=entry.limit if limit is None else limit,
        num_fewshot=entry.num_fewshot if num_fewshot is None else num_fewshot,
    )


def _choose_entries(suite: Suite, wanted: Sequence[str]) -> tuple[SuiteEntry, ...]:
    chosen = {}
    for name in wanted:
        for entry in suite.entries:
            if name == entry.name:
                chosen[entry.name] = entry
                break
            if name in entry.tasks:
                chosen[entry.name] = replace(entry, tasks=(name,))
                break
        else:
            known = sorted({name for entry in suite.entries for name in (entry.name, *entry.tasks)})
            near = name_nearest(name, known, what="its tasks")
            raise ConfigError(f"The suite {suite.name} has no task {name!r}; {near}")
    return tuple(chosen.values())
