"""The files of a tokenizer beside a result: the base's own, byte for byte, where the tokenizer is still the base's.

transformers writes the same tokenizer into other bytes than it read, and whoever reviews a patch compares bytes.
"""

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from .run_config import ModelConfig

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def keep_files_of_base(folder: Path, tokenizer: Any, model: ModelConfig) -> None:
    """Put the base's files in the place of those in `folder`, which `tokenizer` wrote, unless it was changed."""
    name = model.tokenizer or model.name
    if name is None or name != model.name or not _is_unchanged(folder, tokenizer, name, model.revision):
        return
    originals = {file: _find(name, file, model.revision) for file in FILES}
    for file, original in originals.items():
        (folder / file).unlink(missing_ok=True)
        if original is not None:
            (folder / file).write_bytes(original.read_bytes())


def _is_unchanged(folder: Path, tokenizer: Any, name: str, revision: str | None) -> bool:
    """Whether the base's tokenizer, loaded again, is written into the very files that `tokenizer` was."""
    with tempfile.TemporaryDirectory() as fresh:
        AutoTokenizer.from_pretrained(name, revision=revision).save_pretrained(fresh)
        return all(_read(Path(fresh) / file) == _read(folder / file) for file in FILES)


def _find(name: str, file: str, revision: str | None) -> Path | None:
    found = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        _raise_exceptions_for_connection_errors=True,
    )
    return None if found is None else Path(found)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
