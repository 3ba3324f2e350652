"""The files of a tokenizer beside a patch: the base's own, byte for byte, where the tokenizer is still the base's.

transformers writes the same tokenizer into other bytes than it read, and whoever reviews a patch compares bytes.
"""

import tempfile
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer

from ..patches.metadata import TOKENIZER_FILES
from .run_config import ModelConfig


def keep_files_of_base(folder: Path, model: ModelConfig) -> None:
    """Put the base's files in the place of those of the run's tokenizer in `folder`, unless that was changed.

    The base's tokenizer was loaded by its name, so that its files are on this machine.
    """
    if model.name is None or model.tokenizer not in (None, model.name) or not _is_unchanged(folder, model):
        return
    for file in TOKENIZER_FILES:
        original = _find(model.name, file, model.revision)
        (folder / file).unlink(missing_ok=True)
        if original is not None:
            (folder / file).write_bytes(original.read_bytes())


def _is_unchanged(folder: Path, model: ModelConfig) -> bool:
    """Whether the base's tokenizer, loaded again, is written into the very files that lie in `folder`."""
    with tempfile.TemporaryDirectory() as fresh:
        AutoTokenizer.from_pretrained(model.name, revision=model.revision).save_pretrained(fresh)
        return all(_read(Path(fresh) / file) == _read(folder / file) for file in TOKENIZER_FILES)


def _find(name: str, file: str, revision: str | None) -> Path | None:
    base = Path(name).expanduser()
    if base.is_dir():
        return base / file if (base / file).is_file() else None
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
