"""The machine-readable ends of descriptions and comments, by which contributions and reviews are found again.

`<!-- hub_moe:review {...} -->` as the last thing of a text. Whatever people wrote is read strictly: what does not parse
is no mark.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from ..errors import ConfigError
from ..files.tables import read_table

Verdict = Literal["accept", "reject", "incomplete"]

_FORMAT_VERSION = 1
_MAX_CHARACTERS = 20_000
_T = TypeVar("_T")


@dataclass(frozen=True)
class ContributionMark:
    """What a pull request's description says it brings; `records` are ids."""

    name: str
    weights_sha256: str
    base_commit: str | None = None
    records: Sequence[str] = ()
    format_version: int = _FORMAT_VERSION


@dataclass(frozen=True)
class ReviewMark:
    """The verdict on the commit of a pull request.

    Attributes:
        records: The outcome of each replay by the record's id.
        regressions: The tasks that get worse by more than `tolerance`, a share of the base's value.
    """

    commit: str
    verdict: Verdict
    reasons: Sequence[str] = ()
    records: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    regressions: Sequence[str] = ()
    tolerance: float = 0.0
    format_version: int = _FORMAT_VERSION


_KINDS: dict[type[Any], str] = {ContributionMark: "contribution", ReviewMark: "review"}


def write_mark(mark: ContributionMark | ReviewMark) -> str:
    """The comment of HTML that a text ends with; nothing in it can end the comment early."""
    fields = asdict(mark)
    if not fields.get("tolerance", True):
        del fields["tolerance"]  # so that a hub_moe from before it was there reads the mark
    data = json.dumps(fields, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"<!-- hub_moe:{_KINDS[type(mark)]} {data} -->"


def read_mark(cls: type[_T], text: str) -> _T | None:
    """The mark that a text ends with; None if there is none, or it is damaged."""
    found = re.search(rf"<!-- hub_moe:{_KINDS[cls]} (\{{[^<>]*\}}) -->\s*\Z", text[-_MAX_CHARACTERS:])
    if found is None:
        return None
    try:
        mark = read_table(cls, json.loads(found[1]), where="The mark")
    except (ConfigError, ValueError, OverflowError, RecursionError):
        return None
    return mark if getattr(mark, "format_version", None) == _FORMAT_VERSION else None
