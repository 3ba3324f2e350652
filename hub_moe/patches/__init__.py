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
    "hash_base": "expert_patch",
    "load_patched_model": "loading",
    "make_patch": "expert_patch",
    "remove_patch": "applying",
    "swap_patch": "applying",
}

if TYPE_CHECKING:
    from .applying import applied_patches, apply_patch, remove_patch, swap_patch
    from .expert_patch import ExpertPatch, hash_base, make_patch
    from .loading import load_patched_model
    from .metadata import Base, PatchMetadata, Selection

__all__ = [
    "Base",
    "ExpertPatch",
    "PatchMetadata",
    "Selection",
    "applied_patches",
    "apply_patch",
    "hash_base",
    "load_patched_model",
    "make_patch",
    "remove_patch",
    "swap_patch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'hub_moe.patches' has no attribute {name!r}")
