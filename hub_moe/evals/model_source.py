"""Which files a model is: in a folder, or at a commit of a Hub repo, with the sha256 of each."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download

from ..errors import CheckpointError, EvaluationError
from ..files.json_files import read_json
from ..patches.bases import Place, find_base
from ..patches.folders import is_repo_id
from ..patches.metadata import METADATA_FILE, PatchMetadata
from .records import ModelSource
from .records.record import ModelKind

ADAPTER_FILE = "adapter_config.json"

# what decides a model's answers: weights, settings, tokenizer, templates, code
_SUFFIXES = {".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".py", ".tiktoken"}
_NOT_THE_MODEL = {"model_card.json", "report.json", "what_changed.json", "requirements.txt", "LICENSE.txt"}
_KINDS: dict[str, ModelKind] = {METADATA_FILE: "expert_patch", ADAPTER_FILE: "adapter", "config.json": "checkpoint"}
_MAX_PATCHES = 8


@dataclass(frozen=True)
class LocatedModel:
    """A model's files on this machine.

    Attributes:
        folder: Where they are; what `from_pretrained` is given.
        source: What they are.
        base: Likewise for the model below an expert patch or adapter.
    """

    folder: Path
    source: ModelSource
    base: "LocatedModel | None" = None

    @property
    def tokenizer_folder(self) -> Path:
        """The first folder from the top that has a tokenizer.

        Raises:
            CheckpointError: If none has.
        """
        if any(self.folder.glob("tokenizer*")):
            return self.folder
        if self.base is None:
            raise CheckpointError(f"{self.source.name} has no tokenizer, which an evaluation needs.")
        return self.base.tokenizer_folder


def locate_model(
    reference: str, *, revision: str | None = None, subfolder: str | None = None, base: str | None = None
) -> LocatedModel:
    """Find a model, fetch it where it is on the Hub, and hash its files and those of its base.

    Args:
        reference: A folder, or OWNER/NAME on the Hub: a checkpoint, an expert patch or a PEFT adapter.
        revision: Branch, tag, commit or `refs/pr/N` of a repo.
        subfolder: Where in the repo or folder it lies, such as `patches/law`.
        base: Where the base of a patch or adapter is, instead of where that says: a folder, REPO or REPO@REVISION.

    Raises:
        CheckpointError: If there is no model, or it is of no known kind.
        EvaluationError: If a folder is given a revision.
        PatchError: If the base of a patch is not where the patch says.
        OSError: If the Hub cannot be reached or refuses.
    """
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise CheckpointError(f"The subfolder {subfolder!r} leads out of {reference}.")
    return _locate(Place(reference, revision), subfolder, base, depth=0)


def hash_model_files(folder: Path) -> dict[str, str]:
    """sha256 by name of every file directly in `folder` that makes the model what it is."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and decides_answers(path)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((path.name for path in paths), pool.map(_hash_file, paths), strict=True))


def decides_answers(path: Path) -> bool:
    """Whether a file, by its name, is one of those that a record says a model is."""
    return path.suffix in _SUFFIXES and path.name not in _NOT_THE_MODEL and not path.name.startswith(".")


def _locate(place: Place, subfolder: str | None, base: str | None, *, depth: int) -> LocatedModel:
    if depth > _MAX_PATCHES:
        raise CheckpointError(f"{place.name} lies below more than {_MAX_PATCHES} patches; merge some of them.")
    folder, source = _fetch(place, subfolder)
    kind = _kind(folder, place.name)
    source = replace(source, kind=kind, files=hash_model_files(folder))
    if kind == "checkpoint":
        return LocatedModel(folder, source)
    below = _locate(_find_base(folder, kind, place, base), None, None, depth=depth + 1)
    return LocatedModel(folder, replace(source, base=below.source), below)


def _fetch(place: Place, subfolder: str | None) -> tuple[Path, ModelSource]:
    inside = f"{subfolder}/" if subfolder else ""
    if Path(place.name).expanduser().is_dir():
        if place.revision is not None:
            raise EvaluationError(f"{place.name} is a folder, which has no revision {place.revision!r}; leave it out.")
        folder = Path(place.name).expanduser() / inside
        return folder, ModelSource(folder.resolve().name, "checkpoint")
    if not is_repo_id(place.name):
        raise CheckpointError(f"{place.name!r} is neither a folder nor a repo id (OWNER/NAME).")
    wanted = [f"{inside}*{suffix}" for suffix in sorted(_SUFFIXES)]
    snapshot = snapshot_download(
        place.name, revision=place.revision, allow_patterns=wanted, ignore_patterns=f"{inside}*/*"
    )
    commit = Path(snapshot).name
    source = ModelSource(
        place.name, "checkpoint", repo=place.name, revision=commit, requested_revision=place.revision or "main"
    )
    return Path(snapshot) / inside, source


def _kind(folder: Path, reference: str) -> ModelKind:
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            return kind
    raise CheckpointError(f"{reference} holds no model: there is none of {', '.join(_KINDS)}.")


def _find_base(folder: Path, kind: ModelKind, found_in: Place, instead: str | None) -> Place:
    if kind == "expert_patch":
        return find_base(PatchMetadata.read(folder).base, found_in=found_in, instead=instead)
    settings = read_json(folder / ADAPTER_FILE, "the settings of an adapter")
    name = instead or settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / ADAPTER_FILE} does not name the adapter's base; say where it is.")
    name, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    return Place(name, revision or settings.get("revision"))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
