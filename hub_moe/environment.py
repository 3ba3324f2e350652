"""What a result depends on, for whoever repeats it: the versions of packages, and which commit a model was read at."""

import platform
from importlib import metadata
from pathlib import Path

# in the order a reader looks for them; those not installed are left out
_PACKAGES = (
    "hub_moe",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "numpy",
    "triton",
)


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute and fetch; imports none of them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a branch, tag or commit of a Hub repo stood for when its config was last read; None of a path.

    Nothing is fetched. A config itself does not tell (transformers 5.23 drops `_commit_hash`).
    """
    from huggingface_hub import try_to_load_from_cache  # which telling versions must not import

    if Path(name).expanduser().exists():
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
