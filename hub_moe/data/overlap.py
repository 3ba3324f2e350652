"""How much of the evaluation data stands in the training data, by n-grams of words."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .formats import find_layout
from .source import LoadedRows

# Scripts that put no space between words: each character is a unit of its own, as BERT's tokenizer splits Chinese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_SHORTEST = 8  # words; of GPT-3's n-grams, too (arXiv:2005.14165, appendix C)
_CHARACTERS_OF_A_WORD = 1.5
_COMMON = 10  # training rows; what more of them hold is boilerplate (same place)
_EXAMPLES = 10
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a window is lost
_CHUNK_WORDS = 1 << 18


@dataclass(frozen=True)
class OverlapExample:
    """Words that an evaluation row shares with a training row, rows counted from 0."""

    eval_row: int
    train_row: int
    words: str


@dataclass(frozen=True)
class OverlapReport:
    """Overlap of evaluation rows with training rows.

    `eval_rows_hit` share an n-gram that few training rows hold, which `train_rows_hit` are. `eval_rows_common` share
    only n-grams that more than ten training rows hold: instructions and other set phrases. `eval_rows_without_words`
    cannot be measured. Rows count from 0.
    """

    n: int
    train_rows: int
    eval_rows: int
    eval_rows_hit: tuple[int, ...]
    eval_rows_common: tuple[int, ...]
    eval_rows_without_words: tuple[int, ...]
    train_rows_hit: tuple[int, ...]
    share_hit: float
    examples: tuple[OverlapExample, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_overlap(
    train_rows: LoadedRows | Iterable[str], eval_rows: LoadedRows | Iterable[str], *, n: int = 13
) -> OverlapReport:
    """Which evaluation rows share `n` words in a row with training rows.

    As in GPT-3 (arXiv:2005.14165, appendix C; lm-eval's decontamination is the same) case and punctuation do not count,
    `n` is 13, and n-grams in more than ten training rows are set aside. Other than there, text in Chinese, Japanese,
    Thai, Lao, Khmer or Burmese, which whitespace does not split into words, is compared by 1.5 `n` characters: a
    Chinese word has about that many. An evaluation text of 8 to `n` - 1 words (1.5 times as many characters) is sought
    as a whole inside training texts; a shorter one is a hit only where it is all of a training text. Memory grows with
    the evaluation data, not with the training data, which may be a stream.

    Args:
        train_rows: Rows, of which every text counts, or texts.
        eval_rows: The same.
        n: Words of an n-gram, at least 8.

    Raises:
        DatasetError: If `n` is less than 8 or there are no evaluation rows.
    """
    if n < _SHORTEST:
        raise DatasetError(f"n={n}: shorter n-grams than {_SHORTEST} words are found by chance.")
    eval_texts = [[_split_words(text) for text in texts] for texts in _texts_of_rows(eval_rows)]
    if not eval_texts:
        raise DatasetError("There are no evaluation rows to measure overlap with.")
    wanted = _Wanted(eval_texts, n)
    num_train = 0
    for chunk in _chunks(_texts_of_rows(train_rows)):
        wanted.seek(chunk)
        num_train = chunk[-1][0] + 1
    return _report(wanted, num_train=num_train)


@dataclass
class _Windows:
    """Windows of one length in the evaluation texts, and the training rows that hold each (eleven at most)."""

    hashes: NDArray[np.uint64]  # sorted, each once
    places: list[tuple[int, int, int]]  # of each window: row, text, first word
    window_of_place: NDArray[np.int64]
    holders: dict[int, list[int]] = field(default_factory=dict)


class _Wanted:
    """What to look for in training texts. Length 0 stands for texts too short for a window: those are whole."""

    def __init__(self, eval_texts: list[list[list[str]]], n: int) -> None:
        self.n = n
        self.eval_texts = eval_texts
        found: dict[int, tuple[list[NDArray[np.uint64]], list[tuple[int, int, int]]]] = {}
        for row, texts in enumerate(eval_texts):
            for number, words in enumerate(texts):
                if not words:
                    continue
                stretch = _CHARACTERS_OF_A_WORD if _is_mostly_unspaced(words) else 1
                length = min(round(n * stretch), len(words)) if len(words) >= _SHORTEST * stretch else 0
                hashes, places = found.setdefault(length, ([], []))
                new = _hash_windows(_hash_words(words), length or len(words))
                hashes.append(new)
                places.extend((row, number, start) for start in range(len(new)))
        self.windows: dict[int, _Windows] = {}
        for length, (hashes, places) in sorted(found.items()):
            unique, inverse = np.unique(np.concatenate(hashes), return_inverse=True)
            self.windows[length] = _Windows(unique, places, inverse)

    def seek(self, chunk: Sequence[tuple[int, list[str]]]) -> None:
        """Look through training texts, each with the number of its row."""
        words = np.concatenate([_hash_words(words) for _, words in chunk])
        rows = np.repeat([row for row, _ in chunk], [len(words) for _, words in chunk])
        texts = np.repeat(np.arange(len(chunk)), [len(words) for _, words in chunk])
        for length, windows in self.windows.items():
            if length == 0:
                short = [(row, words) for row, words in chunk if 0 < len(words) < _SHORTEST * _CHARACTERS_OF_A_WORD]
                wholes = [_hash_windows(_hash_words(words), len(words)) for _, words in short]
                _note(windows, np.concatenate([np.zeros(0, np.uint64), *wholes]), [row for row, _ in short])
            elif len(words) >= length:
                is_in_one_text = texts[: len(texts) - length + 1] == texts[length - 1 :]
                starts = np.flatnonzero(is_in_one_text)
                _note(windows, _hash_windows(words, length)[starts], rows[starts])


def _note(windows: _Windows, hashes: NDArray[np.uint64], rows: Sequence[int] | NDArray[np.int64]) -> None:
    """Write down which of `hashes`, each from the training row beside it, are wanted."""
    places = np.minimum(np.searchsorted(windows.hashes, hashes), len(windows.hashes) - 1)
    for hit in np.flatnonzero(windows.hashes[places] == hashes).tolist():
        holders = windows.holders.setdefault(int(places[hit]), [])
        row = int(rows[hit])
        if len(holders) <= _COMMON and row not in holders:
            holders.append(row)


def _hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    return np.fromiter((hash(word) & 0xFFFF_FFFF_FFFF_FFFF for word in words), np.uint64, len(words))


def _hash_windows(words: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of each run of `length` words: a wrong hit has odds of 1 in 10^19 per pair compared."""
    total = np.zeros(max(len(words) - length + 1, 0), np.uint64)
    for offset in range(length):
        total = total * _FACTOR + words[offset : offset + len(total)]
    return total


def _report(wanted: _Wanted, *, num_train: int) -> OverlapReport:
    hit_rows, common_rows, train_hit = set(), set(), set()
    examples: dict[int, OverlapExample] = {}
    for length, windows in wanted.windows.items():
        for place, window in zip(windows.places, windows.window_of_place.tolist(), strict=True):
            holders = windows.holders.get(window, [])
            row, text, start = place
            if not holders:
                continue
            if len(holders) > _COMMON:
                common_rows.add(row)
                continue
            hit_rows.add(row)
            train_hit.update(holders)
            words = wanted.eval_texts[row][text]
            shared = _join_words(words[start : start + (length or len(words))])
            examples.setdefault(row, OverlapExample(row, holders[0], shared))
    num_eval = len(wanted.eval_texts)
    return OverlapReport(
        n=wanted.n,
        train_rows=num_train,
        eval_rows=num_eval,
        eval_rows_hit=tuple(sorted(hit_rows)),
        eval_rows_common=tuple(sorted(common_rows - hit_rows)),
        eval_rows_without_words=tuple(row for row, texts in enumerate(wanted.eval_texts) if not any(texts)),
        train_rows_hit=tuple(sorted(train_hit)),
        share_hit=len(hit_rows) / num_eval,
        examples=tuple(examples[row] for row in sorted(examples)[:_EXAMPLES]),
    )


def _chunks(rows: Iterable[list[str]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Texts as words, each with the number of its row; every row has a text, if an empty one."""
    chunk: list[tuple[int, list[str]]] = []
    num_words = 0
    for number, texts in enumerate(rows):
        chunk.extend((number, _split_words(text)) for text in texts or [""])
        num_words += sum(len(words) for _, words in chunk[-len(texts or [""]) :])
        if num_words >= _CHUNK_WORDS:
            yield chunk
            chunk, num_words = [], 0
    if chunk:
        yield chunk


def _split_words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _join_words(words: Sequence[str]) -> str:
    """As text: a space between two words unless both are characters of a script without spaces."""
    unspaced = [bool(_UNSPACED_CHARACTER.match(word)) for word in words]
    joints = ["" if both else " " for both in (a and b for a, b in zip(unspaced, unspaced[1:], strict=False))]
    return "".join(word + joint for word, joint in zip(words, [*joints, ""], strict=True))


def _is_mostly_unspaced(words: Sequence[str]) -> bool:
    return 2 * sum(bool(_UNSPACED_CHARACTER.match(word)) for word in words) > len(words)


def _texts_of_rows(rows: LoadedRows | Iterable[str]) -> Iterator[list[str]]:
    """The texts of each row: those of its format, or all where the columns are of no format."""
    if not isinstance(rows, LoadedRows):
        yield from ([text] for text in rows)
        return
    try:
        columns = [column for names in find_layout(rows).columns.values() for column in names]
    except DatasetError:  # evaluation data may look like anything
        columns = list(rows.columns)
    for row in rows:
        yield [text for column in columns for text in _texts_in(row.get(column))]


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("role", "from"):
                yield from _texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_in(inner)
