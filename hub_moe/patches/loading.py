"""A patched model by the patch's name: its base fetched at the pinned commit, the patch applied."""

from pathlib import Path
from typing import Any

from ..errors import PatchError
from .applying import apply_patch
from .bases import Place, find_base, read_model_type
from .expert_patch import ExpertPatch
from .metadata import MODEL_TYPE

_HUB_OPTIONS = ("token", "cache_dir", "force_download", "local_files_only")
_MAX_PATCHES = 8  # a patch may be made on top of a patched model; a circle must end


def load_patched_model(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """The base's causal language model with the patch applied; transformers must know the base's model type.

    `base` is where the base is to be found instead of where the patch says: a folder, REPO (its main branch) or
    REPO@REVISION. `revision` and `subfolder` are the patch's. All else is given to the base's `from_pretrained`.

    Raises:
        CheckpointError: If the patch is damaged.
        HubError: If the base cannot be read.
        PatchError: If the base is not the one that the patch was made for.
    """
    from transformers import AutoModelForCausalLM

    hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
    place = Place(str(name_or_path), revision)
    patches = [ExpertPatch.load(place.name, place.revision, subfolder, **hub_options)]
    place = find_base(patches[0].metadata.base, found_in=place, instead=base)
    while read_model_type(place, **hub_options) == MODEL_TYPE:
        if len(patches) == _MAX_PATCHES:
            raise PatchError(
                f"{name_or_path} is a patch on a patch, more than {_MAX_PATCHES} deep; merge some of them."
            )
        patches.append(ExpertPatch.load(place.name, place.revision, **hub_options))
        place = find_base(patches[-1].metadata.base, found_in=place)
    loaded = AutoModelForCausalLM.from_pretrained(place.name, revision=place.revision, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
    for patch in reversed(patches):
        apply_patch(model, patch)
    return loaded
