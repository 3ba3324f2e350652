"""Which commit a model was read at: its config no longer tells (transformers 5.23 drops `_commit_hash`)."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache


def find_commit(name: str, revision: str | None = None) -> str | None:
    """The commit that a branch, tag or commit of a Hub repo stood for when its config was last read; None of a path.

    Nothing is fetched.
    """
    if Path(name).expanduser().exists():
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None
