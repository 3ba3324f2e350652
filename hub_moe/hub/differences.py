"""The paired difference of a fine-tune from its base, from the answers of both to the same documents."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import EvaluationError
from ..evals.records import StoredRecord
from .contributions import one_line
from .found_records import RecordReader
from .ranking import Result

Compare = Callable[[StoredRecord, StoredRecord], Mapping[str, Any]]
"""A base's record and a fine-tune's to what `RecordComparison.to_dict` gives."""

_VERDICTS = ("better", "worse", "tied")
_Task = Mapping[str, Any]


class Differences:
    """Compares records pair by pair, each pair once. `notes` say what could not be compared and why."""

    def __init__(self, compare: Compare, records: RecordReader) -> None:
        self._compare, self._records = compare, records
        self._known: dict[tuple[str, str, str | None], Mapping[str, _Task]] = {}
        self.notes: list[str] = []

    def measure(
        self, result: Result, *, base: StoredRecord, candidate: StoredRecord, whose: str, alone: bool
    ) -> Result:
        """The result with interval and verdict, as far as the answers can be had.

        If the answers give other values than the records say, it is left without a base, and so without a gain. `alone`
        compares this task only, so that the verdict is not corrected for others.
        """
        task = self._find(base, candidate, only=result.task if alone else None, whose=whose).get(result.task)
        if task is None or result.base_value is None:
            return result
        said, found = (result.base_value, result.value), (task["base"]["value"], task["candidate"]["value"])
        if all(map(_is_near, said, found)):
            low, high = task["difference"]["low"], task["difference"]["high"]
            return replace(result, interval=(low, high), verdict=task["verdict"])
        if all(one > 0 and _is_near(math.log(one), other) for one, other in zip(said, found, strict=True)):
            return replace(result, verdict=task["verdict"])  # perplexities are compared by their logarithm
        self.notes.append(
            f"{whose}: on {result.task} the answers give {found[1]:.4g} ({found[0]:.4g} for the base) where the "
            f"records say {said[1]:.4g} ({said[0]:.4g}), so no difference is shown."
        )
        return replace(result, base_value=None, base_record=None)

    def _find(
        self, base: StoredRecord, candidate: StoredRecord, *, only: str | None, whose: str
    ) -> Mapping[str, _Task]:
        key = (base.record.id, candidate.record.id, only)
        if key not in self._known:
            has_both = self._records.fetch_table(base) and self._records.fetch_table(candidate)
            self._known[key] = self._ask(base, candidate, only, whose) if has_both else {}
        return self._known[key]

    def _ask(self, base: StoredRecord, candidate: StoredRecord, only: str | None, whose: str) -> Mapping[str, _Task]:
        try:
            with np.errstate(all="ignore"):  # numbers that no score has are refused below
                found = self._compare(_narrow(base, only), _narrow(candidate, only))
        except (EvaluationError, OSError, ArithmeticError) as error:
            reason = one_line(str(error).replace(f"{candidate.path.parent}/", "").replace(f"{base.path.parent}/", ""))
            self.notes.append(f"{whose}: no difference by document: {reason}")
            return {}
        return {task["task"]: task for task in found["comparison"]["tasks"] if _is_sound(task)}


def _narrow(stored: StoredRecord, only: str | None) -> StoredRecord:
    """With one entry alone; the table of answers stays that of all."""
    if only is None:
        return stored
    return replace(stored, record=replace(stored.record, entries=(stored.record.entry(only),)))


def _is_sound(task: _Task) -> bool:
    numbers = (
        task["base"]["value"],
        task["candidate"]["value"],
        *(task["difference"][name] for name in ("low", "high")),
    )
    return task["verdict"] in _VERDICTS and all(math.isfinite(each) for each in numbers)


def _is_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
