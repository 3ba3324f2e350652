"""Documents made from a seed, for suites that run anywhere; `evals/tasks/offline/*.yaml` ask for them by name.

lm_eval calls each with the task's `dataset_kwargs` and its `metadata`, which says nothing here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAMES = ("value", "index", "count", "total", "name", "result", "item", "key", "size", "line", "path", "data")
_VERBS = ("get", "set", "read", "write", "load", "find", "make", "check", "open", "send", "parse", "merge")
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_WORDS = ("apple", "bread", "chair", "dance", "eagle", "flame", "grape", "house", "island", "jelly", "knife", "lemon",
          "mango", "night", "ocean", "paper", "queen", "river", "stone", "tiger")  # fmt: skip
# what a line needs to be Python comes easily to small models; `call` and `return` need a name from lines before
_FRAMES = {
    "block": ("for {a} in {b}.{verb}({c})", ":", (" as", ",", " =")),
    "call": ("{a} = {verb}_{b}({c})\n{d} = {a}.{verb}()\nprint(", "{d})", ("{b})", "{c})", "{verb})")),
    "except": ("try:\n    {a} = {verb}({b})\nexcept", " ValueError:", (" return", " import {c}", " = {d}")),
    "import": ("from {a}", " import {b}", (" return {b}", " for {b}", " def {b}")),
    "method": ("class {A}:\n    def {verb}_{b}(", "self", ("None", "import", "return")),
    "none": ("def {verb}_{a}({a}, {b}):\n    if {a} is not", " None:", (" def:", " class:", " import:")),
    "return": ("def {verb}_{a}({a}, {b}):\n    {b} = {b} + {a}\n    return", " {b}", (" {c}", " {d}", " import")),
}

Document = dict[str, Any]


def make_cloze(num_documents: int = 200, seed: int = 0, **_: Any) -> Any:
    """What comes next in a few lines of Python; `group` is the kind of line."""
    return _make_splits(_cloze, num_documents, seed)


def make_arithmetic(num_documents: int = 200, seed: int = 0, **_: Any) -> Any:
    """Sums and differences of numbers below 20."""
    return _make_splits(_arithmetic, num_documents, seed)


def make_brackets(num_documents: int = 200, seed: int = 0, **_: Any) -> Any:
    """Which bracket closes an expression; `group` is how deep it is."""
    return _make_splits(_brackets, num_documents, seed)


def make_induction(num_documents: int = 200, seed: int = 0, **_: Any) -> Any:
    """Which word followed this word before, in a list of pairs."""
    return _make_splits(_induction, num_documents, seed)


def make_sorting(num_documents: int = 200, seed: int = 0, **_: Any) -> Any:
    """Which of four lists of digits is the sorted one."""
    return _make_splits(_sorting, num_documents, seed)


def make_copying(num_documents: int = 100, seed: int = 0, **_: Any) -> Any:
    """A short name to be written again, between quotes."""
    return _make_splits(_copying, num_documents, seed)


def make_text(num_documents: int = 60, seed: int = 0, **_: Any) -> Any:
    """Small Python modules of about one kilobyte."""
    return _make_splits(_text, num_documents, seed)


def make_rows(entry: str, count: int, *, seed: int) -> list[str]:
    """Texts to train on, of the kind that an entry of the suite `offline` asks about; none is one of its documents.

    Args:
        entry: Its name, such as "sorting".
        count: Texts; short documents stand eight to a text.
        seed: Other texts by another seed.

    Raises:
        ConfigError: If there is no such entry.
    """
    if entry not in _MAKERS:
        from ..errors import ConfigError

        raise ConfigError(f"The suite offline has no entry {entry!r}; it has {', '.join(_MAKERS)}.")
    make, make_splits = _MAKERS[entry]
    asked = {row["query"] for split in make_splits().values() for row in split}
    rng = random.Random(f"rows {entry} {seed}")
    rows: list[str] = []
    while len(rows) < count:
        documents = [make(rng) for _ in range(1 if make is _text else 8)]
        rows.append("\n\n".join(_answered(each) for each in documents if each["query"] not in asked))
    return [row for row in rows if row]


def _answered(document: Document) -> str:
    answer = document.get("answer", "")
    return str(document["query"]) + str(document["choices"][answer] if "choices" in document else answer)


def cut_documents(documents: Any, size_chars: int = 4000) -> Any:
    """Documents with the column `text` cut at line ends, so that a long text has more than one score."""
    from datasets import Dataset

    if "text" not in documents.features:
        from ..errors import DatasetError

        raise DatasetError(f"The text lies in no column `text`; there are {', '.join(documents.features)}.")
    pieces = [piece for row in documents for piece in _cut(row["text"], size_chars) if piece.strip()]
    return Dataset.from_dict({"text": pieces})


def _make_splits(make: Callable[[random.Random], Document], num_documents: int, seed: int) -> Any:
    """`test` without repetition, and `train` for examples in the prompt, which shares none of its documents."""
    from datasets import Dataset, DatasetDict

    rng = random.Random(f"{make.__name__} {seed}")  # a text seeds by its sha512, alike on every machine
    unique: dict[str, Document] = {}
    while len(unique) < num_documents + _NUM_EXAMPLES:
        document = make(rng)
        unique.setdefault(str(document["query"]), document)
    documents = list(unique.values())
    return DatasetDict(
        {
            "test": Dataset.from_list(documents[:num_documents]),
            "train": Dataset.from_list(documents[num_documents:]),
        }
    )


_NUM_EXAMPLES = 20


def _choose(rng: random.Random, query: str, right: str, wrong: Sequence[str], group: str) -> Document:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "answer": choices.index(right), "group": group}


def _cloze(rng: random.Random) -> Document:
    group = rng.choice(list(_FRAMES))
    query, right, wrong = _FRAMES[group]
    words = dict(zip("abcd", rng.sample(_NAMES, 4), strict=True)) | {"verb": rng.choice(_VERBS)}
    words["A"] = words["a"].capitalize() + rng.choice(_NAMES).capitalize()
    query = f"# {rng.choice(_VERBS)} the {rng.choice(_NAMES)}\n{query}"
    return _choose(rng, _fill(query, words), _fill(right, words), [_fill(each, words) for each in wrong], group)


def _fill(text: str, words: Mapping[str, str]) -> str:
    return text.format_map(words)


def _arithmetic(rng: random.Random) -> Document:
    a, b = rng.randrange(20), rng.randrange(20)
    sign = rng.choice("+-") if a >= b else "+"
    result = a + b if sign == "+" else a - b
    wrong = rng.sample([other for other in range(max(0, result - 5), result + 6) if other != result], 3)
    return _choose(rng, f"{a} {sign} {b} =", f" {result}", [f" {other}" for other in wrong], f"{sign}")


def _brackets(rng: random.Random) -> Document:
    depth = rng.randint(1, 4)
    opened: list[str] = []
    query = f"{rng.choice(_NAMES)} = "
    while len(opened) < depth:
        opened.append(rng.choice(list(_PAIRS)))
        inner = rng.choice(list(_PAIRS))
        closed = f"{inner}{rng.choice(_NAMES)}{_PAIRS[inner]}, " if rng.random() < 0.4 else ""
        query += f"{opened[-1]}{closed}"
    query += rng.choice(_NAMES)
    right = _PAIRS[opened[-1]]
    return _choose(rng, query, right, [each for each in _PAIRS.values() if each != right], f"depth {depth}")


def _induction(rng: random.Random) -> Document:
    words = rng.sample(_WORDS, 8)
    pairs = list(zip(words[:4], words[4:], strict=True))
    asked, answer = rng.choice(pairs)
    shown = [pair for _ in range(2) for pair in rng.sample(pairs, len(pairs))]
    query = "\n".join(f"{first} {second}" for first, second in shown) + f"\n{asked}"
    return _choose(rng, query, f" {answer}", [f" {second}" for _, second in pairs if second != answer], "induction")


def _sorting(rng: random.Random) -> Document:
    digits = rng.sample(range(10), 4)
    right = sorted(digits)
    wrong: list[list[int]] = []
    while len(wrong) < 3:
        other = rng.sample(digits, 4)
        if other != right and other not in wrong:
            wrong.append(other)
    return _choose(
        rng, f"sorted([{_join(digits)}]) ==", f" [{_join(right)}]", [f" [{_join(each)}]" for each in wrong], "sorting"
    )


def _join(digits: Sequence[int]) -> str:
    return ", ".join(map(str, digits))


def _copying(rng: random.Random) -> Document:
    name = "_".join(rng.sample(_NAMES, rng.randint(1, 2)))
    other = rng.choice(_NAMES)
    return {"query": f'{other} = "{name}"\nprint({other})  # prints', "answer": f'"{name}"', "group": "copying"}


def _text(rng: random.Random) -> Document:
    lines = [f'"""{rng.choice(_VERBS).capitalize()} the {rng.choice(_NAMES)}."""', ""]
    while sum(map(len, lines)) < 900:
        document = _cloze(rng)
        lines += [document["query"] + document["choices"][document["answer"]], ""]
    text = "\n".join(lines)
    return {"query": text, "text": text, "group": "text"}


def _cut(text: str, size: int) -> list[str]:
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > size:
            pieces.append(piece)
            piece = ""
        piece += line
    return [*pieces, piece]


_MAKERS: Mapping[str, tuple[Callable[[random.Random], Document], Callable[..., Any]]] = {
    "cloze": (_cloze, make_cloze),
    "arithmetic": (_arithmetic, make_arithmetic),
    "brackets": (_brackets, make_brackets),
    "induction": (_induction, make_induction),
    "sorting": (_sorting, make_sorting),
    "running_text": (_text, make_text),
    "copying": (_copying, make_copying),
}
