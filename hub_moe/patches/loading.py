"""A patched model by the patch's name: its base fetched at the pinned commit, the patch applied."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, HubError, PatchError
from .applying import apply_patch
from .expert_patch import ExpertPatch
from .folders import is_repo_id
from .metadata import MODEL_TYPE, Base

_HUB_OPTIONS = ("token", "cache_dir", "force_download", "local_files_only")
_MAX_PATCHES = 8  # a patch may be made on top of a patched model; a circle must end


@dataclass(frozen=True)
class _Place:
    """A folder (`revision` None) or a repo at a revision."""

    name: str
    revision: str | None

    @property
    def is_folder(self) -> bool:
        return Path(self.name).is_dir()


def load_patched_model(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """The base's causal language model with the patch applied; transformers must know the base's model type.

    `base` is where the base is to be found instead of where the patch says: a folder, or a repo, whose main branch is
    then used. `revision` and `subfolder` are the patch's. All else is given to the base's `from_pretrained`.

    Raises:
        CheckpointError: If the patch is damaged.
        HubError: If the base cannot be read.
        PatchError: If the base is not the one that the patch was made for.
    """
    from transformers import AutoModelForCausalLM

    hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
    place = _Place(str(name_or_path), revision)
    patches = [ExpertPatch.load(place.name, place.revision, subfolder, **hub_options)]
    place = _Place(str(base), None) if base is not None else _place_of_base(patches[0].metadata.base, found_in=place)
    while _model_type(place, **hub_options) == MODEL_TYPE:
        if len(patches) == _MAX_PATCHES:
            raise PatchError(
                f"{name_or_path} is a patch on a patch, more than {_MAX_PATCHES} deep; merge some of them."
            )
        patches.append(ExpertPatch.load(place.name, place.revision, **hub_options))
        place = _place_of_base(patches[-1].metadata.base, found_in=place)
    loaded = AutoModelForCausalLM.from_pretrained(place.name, revision=place.revision, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
    for patch in reversed(patches):
        apply_patch(model, patch)
    return loaded


def _place_of_base(base: Base, *, found_in: _Place) -> _Place:
    if base.commit is None:
        if not found_in.is_folder or not Path(base.repo).is_dir():
            raise PatchError(
                f"The patch {found_in.name} is for the base {base.repo!r}, a folder where it was made, which is not "
                "here; say with base=... where the base is."
            )
        return _Place(base.repo, None)
    if not is_repo_id(base.repo):
        raise CheckpointError(f"The patch {found_in.name} names as its base {base.repo!r}, which is no repo id.")
    if Path(base.repo).is_dir():
        raise PatchError(
            f"The folder {base.repo} stands where the repo {base} is meant; if it is a copy of the base, pass "
            f"base='./{base.repo}'."
        )
    return _Place(base.repo, base.commit)


def _model_type(base: _Place, **hub_options: Any) -> Any:
    """What the base's config.json says it is."""
    path = Path(base.name) / "config.json" if base.is_folder else _fetch_config(base, **hub_options)
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The base {base.name} has no readable config.json: {error}.") from error


def _fetch_config(base: _Place, **hub_options: Any) -> Path:
    what = f"The patch's base {base.name}" + (f" at commit {base.revision}" if base.revision else "")
    try:
        return Path(hf_hub_download(base.name, "config.json", revision=base.revision, **hub_options))
    except GatedRepoError as error:
        raise HubError(f"{what} is gated; ask for access on its page, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{what} is not on {constants.ENDPOINT}: it was deleted or renamed, or it is private and needs "
            "`hf auth login`; base=... takes a copy of it."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{what} is no longer there: the repo has no such commit; base=... takes a copy.") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what} is not in the local cache, and {constants.ENDPOINT} cannot be reached.") from error
    except EntryNotFoundError as error:
        raise HubError(f"{what} has no config.json, so it is no model.") from error
