"""The versions that a result depends on, for whoever repeats it."""

import platform
from importlib import metadata

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
