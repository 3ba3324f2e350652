"""Answers of a run that has not ended yet, so that an interrupted one asks no question twice.

A journal belongs to one model run in one way: its name is a hash over the model's files, the dtype, the kernels and the
batch size, so a base and its fine-tune never share an answer. lm_eval's own cache is keyed by the prompt alone.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .records.record import hash_json
from .request_hashes import plain_json

Answer = Any  # (log-likelihood, is greedy), a log-likelihood, or a text, as lm_eval's models give them


class Journal:
    """One answer a line, by the hash of its request; a torn last line, as `kill -9` can leave it, is dropped.

    Also what lm_eval calls a cache hook: models tell it every answer as soon as they have it.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{hash_json(key)}.jsonl"
        _truncate_to_whole_lines(self.path)
        self._answers = dict(_read(self.path))
        self.num_found = len(self._answers)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)  # a line reaches the system when it is written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def find(self, kind: str, arguments: Sequence[Any]) -> Answer | None:
        """The answer to a request, or None."""
        return self._answers.get(hash_question(kind, arguments))

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Answer) -> None:
        """Keep an answer; answers drawn at random are not kept, since asking again would draw others."""
        arguments = list(arguments)
        if is_drawn(arguments):
            return
        request = hash_question(kind, arguments)
        if request in self._answers:
            return
        self._answers[request] = answer
        line = json.dumps([request, answer])
        self._file.write(f"{zlib.crc32(line.encode()):08x} {line}\n")

    def remove(self) -> None:
        """The run has ended, and its record has every answer."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def hash_question(kind: str, arguments: Iterable[Any]) -> str:
    """sha256 of a request's kind and all its arguments: context, continuation, generation settings."""
    return hash_json([kind, plain_json(list(arguments))])


def is_drawn(arguments: Sequence[Any]) -> bool:
    """Whether the answer to a request is drawn at random."""
    settings = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], dict) else {}
    return bool(settings.get("do_sample") or settings.get("temperature"))


def _read(path: Path) -> Iterable[tuple[str, Answer]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        checksum, _, content = line.partition(" ")
        if f"{zlib.crc32(content.encode()):08x}" == checksum:
            request, answer = json.loads(content)
            yield request, tuple(answer) if isinstance(answer, list) else answer


def _truncate_to_whole_lines(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
