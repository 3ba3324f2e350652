"""Expert patches: saved, loaded, applied to a base and taken off it, compared, merged.

`metadata` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY_NAMES = {
    "Base": "metadata",
    "ExpertPatch": "expert_patch",
    "PatchMetadata": "metadata",
    "Selection": "metadata",
    "applied_patches": "applying",
    "apply_patch": "applying",
    "diff_patches": "comparison",
    "hash_base": "expert_patch",
    "load_patched_model": "loading",
    "make_patch": "expert_patch",
    "measure_changes": "comparison",
    "merge_into_base": "merging",
    "remove_patch": "applying",
    "swap_patch": "applying",
    "verify_patch": "verification",
}

if TYPE_CHECKING:
    from .applying import applied_patches, apply_patch, remove_patch, swap_patch
    from .comparison import diff_patches, measure_changes
    from .expert_patch import ExpertPatch, hash_base, make_patch
    from .loading import load_patched_model
    from .merging import merge_into_base
    from .metadata import Base, PatchMetadata, Selection
    from .verification import verify_patch

__all__ = [
    "Base",
    "ExpertPatch",
    "PatchMetadata",
    "Selection",
    "applied_patches",
    "apply_patch",
    "diff_patches",
    "hash_base",
    "load_patched_model",
    "make_patch",
    "measure_changes",
    "merge_into_base",
    "remove_patch",
    "swap_patch",
    "verify_patch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'hub_moe.patches' has no attribute {name!r}")
