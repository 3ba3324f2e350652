"""Results that people's prose claims: which numbers of a README must be those of a record.

The rule. A number is a claimed result if it stands in one sentence, or in one table with its heading, with the name of
a metric or of a task, and is written as scores are: with a decimal point, or in per cent. Left alone are: numbers in
code, in addresses, with a unit that no score has (GB, tokens, seconds, ...), after a setting's name (temperature,
learning rate, version, ...) or in a column of that name, in the head of a table, whole numbers without %, and sentences
and tables that link to their source, since those are somebody else's results. A claimed result must be, at the
precision it is written in, a number of a record or of the run: as it is or in per cent.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_METRICS = (
    r"accuracy|acc|exact[ _-]match|f1(?:[ -]score)?|bleu|rouge(?:-\w)?|pass@\d+|perplexity|ppl|bits per byte|"
    r"bits_per_byte|bpb|score[sd]?|win rate|error rate|log-?likelihood"
)
_TASKS = (
    r"mmlu(?:[ _-]pro)?|gsm8k|hellaswag|arc(?:[ _-](?:easy|challenge|e|c))|winogrande|piqa|boolq|lambada(?:_\w+)?|gpqa|"
    r"humaneval|mbpp|truthfulqa|bbh|ifeval|aime|math-?500"
)
_NUMBER = re.compile(
    r"(?<![\w.,/#@^-])[-+±−~≈]?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![\w]|\.\d|/\d)(\s?(?:%|percent|per cent))?"
)
_UNIT = re.compile(
    r"\s?(?:[KMGTP]i?B|[kMGTP]?FLOPs?|B|M|K|k|bn|million|billion|trillion|parameters|params|tokens?|steps?|epochs?|"
    r"documents?|examples?|samples?|questions?|shots?|-shot|m?s|sec(?:onds)?|min(?:utes)?|h|hours?|days?|k?Wh|kg|g|W|x|×|"
    r"times|GPUs?|USD|\$|€)\b"
)
_SETTING = re.compile(
    r"(?:temperature|top[-_ ]?[pk]|learning[-_ ]rate|lr|dropout|decay|warm-?up|seed|threshold|alpha|beta\d?|epsilon|"
    r"version|v|section|table|figure|chapter|python|torch|transformers|cuda|p)\s*(?:of|is|was|at|=|:|<|≤|>)?\s*$",
    re.IGNORECASE,
)
_CODE = re.compile(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]*`|<!--.*?-->", re.DOTALL | re.MULTILINE)
_ADDRESS = re.compile(r"https?://\S+|\barxiv:\s?\d{4}\.\d{4,5}", re.IGNORECASE)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_SETTING_COLUMN = re.compile(
    r"\b(?:temperature|top[-_ ]?[pk]|learning[-_ ]rate|lr|dropout|decay|seeds?|threshold|alpha|beta|versions?|params|"
    r"parameters|tokens|size|memory|hours|seconds|speed|cost|shots?|steps?|epochs?)\b",
    re.IGNORECASE,
)
_TABLE = re.compile(r"(?:^#{1,6}[^\n]*\n\s*)?(?:^[ \t]*\|[^\n]*(?:\n|\Z)){2,}", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+(?=[A-Z\d*_\[(])|\n\s*\n|\n(?=\s*(?:[-*+]|\d+\.)\s)|\n(?=#)")


@dataclass(frozen=True)
class Claim:
    """A number as it is written, where it begins in the text, and how many decimals it has."""

    text: str
    position: int
    value: float
    decimals: int
    is_percent: bool

    def is_backed_by(self, known: Iterable[float]) -> bool:
        """Whether one of the numbers is this one, rounded as it is here, or in per cent."""
        slack = 0.5000001 * 10.0**-self.decimals
        scales = (100.0,) if self.is_percent else (1.0, 100.0)
        return any(abs(abs(number) * scale - abs(self.value)) <= slack for number in known for scale in scales)


def find_claims(text: str, names: Iterable[str] = ()) -> Iterator[Claim]:
    """The claimed results in a text; `names` are further names of metrics and tasks."""
    known = "|".join([_METRICS, _TASKS, *(re.escape(name) for name in names if len(name) > 2)])
    about = re.compile(rf"(?<![\w-])(?:{known})(?![\w-])", re.IGNORECASE)
    plain = _blank(_IMAGE, _blank(_CODE, text, keeps_spans=True))
    for start, end in _contexts(plain):
        context = plain[start:end]
        if about.search(context) and not _ADDRESS.search(context):
            for cell_start, cell_end in _cells(context) if _TABLE.fullmatch(context) else [(0, len(context))]:
                yield from _find_numbers(context[cell_start:cell_end], offset=start + cell_start)


def _find_numbers(context: str, *, offset: int) -> Iterator[Claim]:
    for match in _NUMBER.finditer(context):
        whole, fraction, percent = match.groups()
        if not fraction and not percent:
            continue
        if not percent and _UNIT.match(context, match.end()):
            continue
        if _SETTING.search(context[: match.start()]):
            continue
        value = float(whole.replace(",", "") + (fraction or ""))
        decimals = len(fraction) - 1 if fraction else 0
        yield Claim(match.group().strip(), offset + match.start(), value, decimals, bool(percent))


def _contexts(text: str) -> Iterator[tuple[int, int]]:
    """Stretches that are read together: a table with the heading above it, else a sentence."""
    position = 0
    for table in _TABLE.finditer(text):
        yield from _sentences(text, position, table.start())
        yield table.start(), table.end()
        position = table.end()
    yield from _sentences(text, position, len(text))


def _cells(table: str) -> Iterator[tuple[int, int]]:
    """The cells below a table's head, without those whose column is a setting."""
    lines = list(re.finditer(r"^[ \t]*\|[^\n]*", table, re.MULTILINE))
    has_head = set(lines[1].group()) <= set("|:- \t")
    names = lines[0].group().strip().strip("|").split("|") if has_head else []
    for line in lines[1:] if has_head else lines:
        start = line.start() + line.group().index("|") + 1
        for place, cell in enumerate(line.group()[start - line.start() :].split("|")):
            if place >= len(names) or not _SETTING_COLUMN.search(names[place]):
                yield start, start + len(cell)
            start += len(cell) + 1


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _SENTENCE_END.finditer(text, start, end):
        yield start, match.start()
        start = match.end()
    yield start, end


def _blank(pattern: re.Pattern[str], text: str, *, keeps_spans: bool = False) -> str:
    """With spaces in place of what matches, so that positions stay; names of metrics in code spans are kept."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        if keeps_spans and found.startswith("`") and not found.startswith("```"):
            return re.sub(r"[`\d]", " ", found) if re.search(r"\d\.\d|\d\s?%", found) else found.replace("`", " ")
        return re.sub(r"[^\n]", " ", found)

    return pattern.sub(blank, text)
