"""Expert patches: saved, loaded, applied to a base and taken off it, compared, combined, rebased, merged.

`metadata` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY_NAMES = {
    "Base": "metadata",
    "Combination": "metadata",
    "CombinationMethod": "combination_methods",
    "CombinedPatch": "combining",
    "ConflictTable": "conflicts",
    "Contributor": "metadata",
    "ExpertPatch": "expert_patch",
    "PatchMetadata": "metadata",
    "Selection": "metadata",
    "applied_patches": "applying",
    "apply_patch": "applying",
    "combine_patches": "combining",
    "diff_patches": "comparison",
    "find_conflicts": "combining",
    "hash_base": "expert_patch",
    "load_patched_model": "applying",
    "make_patch": "expert_patch",
    "measure_changes": "comparison",
    "merge_into_base": "merging",
    "rebase_patch": "rebasing",
    "remove_patch": "applying",
    "swap_patch": "applying",
    "verify_patch": "verification",
}

if TYPE_CHECKING:
    from .applying import applied_patches, apply_patch, load_patched_model, remove_patch, swap_patch
    from .combination_methods import CombinationMethod
    from .combining import CombinedPatch, combine_patches, find_conflicts
    from .comparison import diff_patches, measure_changes
    from .conflicts import ConflictTable
    from .expert_patch import ExpertPatch, hash_base, make_patch
    from .merging import merge_into_base
    from .metadata import Base, Combination, Contributor, PatchMetadata, Selection
    from .rebasing import rebase_patch
    from .verification import verify_patch

__all__ = [
    "Base",
    "Combination",
    "CombinationMethod",
    "CombinedPatch",
    "ConflictTable",
    "Contributor",
    "ExpertPatch",
    "PatchMetadata",
    "Selection",
    "applied_patches",
    "apply_patch",
    "combine_patches",
    "diff_patches",
    "find_conflicts",
    "hash_base",
    "load_patched_model",
    "make_patch",
    "measure_changes",
    "merge_into_base",
    "rebase_patch",
    "remove_patch",
    "swap_patch",
    "verify_patch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'hub_moe.patches' has no attribute {name!r}")
