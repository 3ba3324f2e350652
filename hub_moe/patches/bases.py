"""Where the base of a patch is: as the patch says, or as its reader does, in a folder or at a commit on a Hub."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, HubError, PatchError
from .base_files import INDEX_FILE, find_shards, read_checkpoint_places
from .folders import is_repo_id
from .metadata import MODEL_TYPE, Base
from .tensor_file import TensorPlace

# what a checkpoint's repo may hold besides the checkpoint: pickles, other formats, other people's notes
_NOT_PART_OF_IT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.gguf", "*/*", ".*")


@dataclass(frozen=True)
class Place:
    """A folder (`revision` None) or a repo at a revision."""

    name: str
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine's disk."""
        return Path(self.name).is_dir()

    def __str__(self) -> str:
        return f"{self.name} at commit {self.revision}" if self.revision else self.name


def find_base(base: Base, *, found_in: Place, instead: str | Path | None = None) -> Place:
    """Where the base is: `instead` (a folder, REPO or REPO@REVISION), if given, or what the patch `found_in` says.

    Raises:
        PatchError: If the base was a folder that is not here, a folder is in its way, or `instead` is no name.
        CheckpointError: If what the patch says is no name of a repo.
    """
    if instead is not None:
        if Path(instead).is_dir():
            return Place(str(instead))
        name, _, revision = str(instead).partition("@")
        if not is_repo_id(name):
            raise PatchError(f"The base {str(instead)!r} is neither a folder nor a repo id (OWNER/NAME[@REVISION]).")
        return Place(name, revision or None)
    if base.commit is None:
        if not found_in.is_folder or not Path(base.repo).is_dir():
            raise PatchError(
                f"The patch {found_in.name} is for the base {base.repo!r}, a folder where it was made, which is not "
                "here; say where the base is (base=... or --base)."
            )
        return Place(base.repo)
    if not is_repo_id(base.repo):
        raise CheckpointError(f"The patch {found_in.name} names as its base {base.repo!r}, which is no repo id.")
    if Path(base.repo).is_dir():
        raise PatchError(
            f"The folder {base.repo} stands where the repo {base} is meant; if it is a copy of the base, give "
            f"'./{base.repo}' as base."
        )
    return Place(base.repo, base.commit)


def read_model_type(base: Place, **hub_options: Any) -> Any:
    """What the base's config.json says it is.

    Raises:
        CheckpointError: If it cannot be read.
        HubError: If it cannot be fetched; the message says why.
    """
    if base.is_folder:
        path = Path(base.name) / "config.json"
    else:
        with _described(base):
            path = Path(hf_hub_download(base.name, "config.json", revision=base.revision, **hub_options))
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The base {base.name} has no readable config.json: {error}.") from error


def fetch_base(base: Place, **hub_options: Any) -> Path:
    """The folder with the files of the base's checkpoint, fetched where it is a repo.

    Raises:
        CheckpointError: If the base is itself a patch, or no checkpoint.
        HubError: If it cannot be fetched; the message says why.
    """
    if read_model_type(base, **hub_options) == MODEL_TYPE:
        raise CheckpointError(f"The base {base} is itself an expert patch; merge that one into its base first.")
    if base.is_folder:
        return Path(base.name)
    with _described(base):
        return Path(
            snapshot_download(base.name, revision=base.revision, ignore_patterns=list(_NOT_PART_OF_IT), **hub_options)
        )


def pin_base(base: Place, **hub_options: Any) -> Place:
    """The base at the commit that its revision means now; a folder stays what it is.

    Raises:
        CheckpointError: If the base is itself a patch, or no checkpoint.
        HubError: If it cannot be fetched; the message says why.
    """
    if read_model_type(base, **hub_options) == MODEL_TYPE:
        raise CheckpointError(f"The base {base} is itself an expert patch; merge that one into its base first.")
    return base if base.is_folder else replace(base, revision=_fetch_some(base, ["config.json"], hub_options).name)


def fetch_places(base: Place, names: Iterable[str], **hub_options: Any) -> dict[str, TensorPlace]:
    """Where the files of a base hold tensors, of a repo only the files that may hold those of the `names` in memory.

    Raises:
        CheckpointError: If its files are damaged.
        HubError: If they cannot be fetched; the message says why.
    """
    if base.is_folder:
        return read_checkpoint_places(Path(base.name))
    pinned = pin_base(base, **hub_options)
    folder = _fetch_some(pinned, [INDEX_FILE], hub_options)
    shards = find_shards(folder, names)
    _fetch_some(pinned, shards, hub_options)
    for name in shards:
        if not (folder / name).is_file():
            raise CheckpointError(f"{base} lacks {name}; a checkpoint in safetensors format was expected.")
    return read_checkpoint_places(folder, shards)


def _fetch_some(base: Place, files: list[str], hub_options: dict[str, Any]) -> Path:
    with _described(base):
        return Path(snapshot_download(base.name, revision=base.revision, allow_patterns=files, **hub_options))


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in `folder`, without weights in other formats, hidden files and subfolders."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not any(path.match(pattern) for pattern in _NOT_PART_OF_IT if pattern != "*/*")
    ]


@contextmanager
def _described(base: Place) -> Iterator[None]:
    """Says of the client's errors what they mean for the base of a patch."""
    what = f"The patch's base {base}"
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"{what} is gated; ask for access on its page, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what} is not on {constants.ENDPOINT}: it was deleted or renamed, or it is private and needs "
            "`hf auth login`; a copy of it can be given as base."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what} is not there: the repo has no such commit; a copy can be given as base.") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what} is not in the local cache, and {constants.ENDPOINT} cannot be reached.") from error
    except EntryNotFoundError as error:
        raise HubError(f"{what} has no config.json, so it is no model.") from error
