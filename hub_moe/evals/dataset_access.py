"""What stands between a suite and its datasets: gates, scripts, missing repos, no network, files of the user's own."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DatasetError, HubMoeError

DatasetState = Literal[
    "made here", "local files", "reachable", "cached", "gated", "script-only", "missing", "unreachable", "unreadable"
]
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
_PACKAGED = {"json", "parquet", "csv", "text", "arrow", "webdataset", "imagefolder", "audiofolder", "xml"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class LocalFiles:
    """Files that stand for a Hub dataset. `names` are paths from the user's folder by split, `paths` where they lie."""

    builder: str
    names: Mapping[str, str]
    paths: Mapping[str, str]


def hub_dataset(settings: Mapping[str, Any]) -> str | None:
    """The Hub dataset of a task; None where its documents come from code or from files."""
    path = settings.get("dataset_path")
    if settings.get("custom_dataset") or not isinstance(path, str) or path in _PACKAGED or Path(path).exists():
        return None
    return path


def eval_split(settings: Mapping[str, Any]) -> str:
    """The split whose documents are asked about, as lm_eval chooses it."""
    return str(settings.get("test_split") or settings.get("validation_split"))


def find_local_files(data_dir: Path, settings: Mapping[str, Any]) -> LocalFiles | None:
    """The user's files for a task: `DATASET/SPLIT.jsonl` (or json, parquet, csv, txt), or `DATASET/CONFIG/SPLIT...`.

    None where there is no folder with the last part of the dataset's name.

    Raises:
        DatasetError: If the folder lacks the split that is asked about, an empty file, or files of several kinds.
    """
    folder = data_dir / str(settings.get("dataset_path")).rpartition("/")[2]
    config = folder / str(settings.get("dataset_name"))
    folder = config if settings.get("dataset_name") and config.is_dir() else folder
    if not folder.is_dir():
        return None
    splits = {str(settings[key]) for key in _SPLITS if settings.get(key)}
    paths = {split: path for split in sorted(splits) if (path := _find_file(folder, split))}
    wanted = eval_split(settings)
    if wanted not in paths:
        raise DatasetError(
            f"{_name(folder, data_dir)} lacks the split {wanted!r} of {settings['task']}: put {wanted}.jsonl, "
            f".json, .parquet, .csv or .txt there."
        )
    empty = next((path for path in paths.values() if not path.stat().st_size), None)
    if empty:
        raise DatasetError(f"{_name(empty, data_dir)} is empty.")
    builders = {_BUILDERS[path.suffix] for path in paths.values()}
    if len(builders) > 1:
        raise DatasetError(f"The files of {_name(folder, data_dir)} are of different kinds; give files of one kind.")
    names = {split: _name(path, data_dir) for split, path in paths.items()}
    return LocalFiles(builders.pop(), names, {split: str(path.resolve()) for split, path in paths.items()})


def loaded_revision(dataset: Any, split: str) -> str | None:
    """The commit that a Hub dataset's rows really came from: `datasets` names the folder of its cache by it."""
    for file in getattr(dataset[split], "cache_files", ()):
        folder = Path(file["filename"]).parent.name
        if _COMMIT.fullmatch(folder):
            return folder
    return None


def explain_other_revision(path: str, *, revision: str | None, pinned: str | None) -> str | None:
    """The sentence for people where the cache holds another commit than the suite pins; None where it does not."""
    if revision is None or pinned is None or revision == pinned:
        return None
    return f"{path} lies in the cache at {revision}, but the suite pins {pinned}; connect to the Hub once to read that."


@contextmanager
def explain_dataset_errors(path: str) -> Iterator[None]:
    """Errors of `datasets` and the Hub inside the block as one sentence about the dataset `path`.

    Raises:
        DatasetError: What stands in the way, and what to do.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except HubMoeError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        state = classify_error(error)
        if state is None:
            raise
        raise DatasetError(explain_state(state, path, error)) from error


def explain_state(state: DatasetState, path: str, error: BaseException) -> str:
    """The sentence for people about a dataset in a state that `classify_error` gives."""
    return _SENTENCES[state].format(path=path, reason=_first_line(error))


def classify_error(error: BaseException) -> DatasetState | None:
    """What an error of `datasets` or the Hub says about a dataset; None where it is another kind of error."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    text = str(error)
    if isinstance(error, GatedRepoError) or "is a gated dataset" in text:
        return "gated"
    if "Dataset scripts are no longer supported" in text:
        return "script-only"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError) or "doesn't exist" in text:
        return "missing"
    if isinstance(error, ConnectionError | HfHubHTTPError) or "outgoing traffic has been disabled" in text:
        return "unreachable"
    if isinstance(error, DatasetsError | FileNotFoundError) or type(error) is ValueError:
        return "unreadable"
    return None


_SENTENCES: dict[str, str] = {
    "gated": "{path} is a gated dataset and no token that may read it was found: ask for access on its page, then "
    "run hf auth login.",
    "script-only": "{path} is read by a script of its author, which datasets no longer runs; choose a task on a copy "
    "in parquet or json.",
    "missing": "{path} does not exist on this Hub at the revision asked for, or is private and your token may not see "
    "it.",
    "unreachable": "The Hub cannot be reached for {path}, and it is not in the cache: {reason}",
    "unreadable": "{path} cannot be read: {reason}",
}


def _find_file(folder: Path, split: str) -> Path | None:
    return next((path for ending in _BUILDERS if (path := folder / f"{split}{ending}").is_file()), None)


def _name(path: Path, data_dir: Path) -> str:
    return path.relative_to(data_dir).as_posix()


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
