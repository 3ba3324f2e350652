"""The proof of what a training run changed: hashes of every tensor before and after, compared by kind and layer."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..errors import TrainingProofError
from .expert_tensors import hash_tensor, named_tensors
from .moe_layers import find_moe_layers
from .parameters import KINDS, Kind

_VERSION = 1
_SHOWN = 3  # names in an error message

Problem = Literal["changed, not trained", "trained, not changed"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)

COLUMNS = ("kind", "layer", "tensors", "numbers", "trained", "changed", "before", "after")


@dataclass(frozen=True)
class TensorPrint:
    """One tensor: what it is for, how many numbers of which type it holds, and the sha256 of its bytes."""

    kind: Kind
    layer: int | None
    size: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Fingerprint:
    """The tensors of a model by name, stacked experts one by one, buffers that are saved among them."""

    tensors: Mapping[str, TensorPrint]

    @property
    def combined_sha256(self) -> str:
        """One hash over the names and hashes of all tensors."""
        lines = (f"{name} {tensor.sha256}\n" for name, tensor in sorted(self.tensors.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint(model: nn.Module, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Fingerprint:
    """Hash every parameter and persistent buffer, a few at a time; tied weights once.

    Of a split model it holds the trained rows, in the type they are kept in; where that is not the model's, merge the
    experts first. `on_progress` is told the bytes that are done and those there are in all.

    Raises:
        UnsupportedModelError: If the model has no routed experts.
        CheckpointError: If the model has no weights in memory (meta device).
    """
    rows = list(named_tensors(model, find_moe_layers(model)))
    total, done = sum(view.nbytes for *_, view in rows), 0
    tensors: dict[str, TensorPrint] = {}
    for (name, kind, layer, view), sha256 in zip(rows, _hash_in_order(view for *_, view in rows), strict=True):
        dtype = str(view.dtype).removeprefix("torch.")
        tensors[name] = TensorPrint(kind=kind, layer=layer, size=view.numel(), dtype=dtype, sha256=sha256)
        done += view.nbytes
        on_progress(done, total)
    return Fingerprint(tensors)


def _hash_in_order(views: Iterable[Tensor]) -> Iterator[str]:
    """In threads, since hashing does not hold the interpreter; few at once, since a view on a GPU is copied first."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[str]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for view in views:
            waiting.append(pool.submit(hash_tensor, view))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class ChangeRow:
    """The tensors of one kind in one layer (None: outside of layers); hashes are over their sorted names and hashes."""

    kind: Kind
    layer: int | None
    tensors: int
    numbers: int
    trained_tensors: int
    trained_numbers: int
    changed_tensors: int
    changed_numbers: int
    sha256_before: str
    sha256_after: str

    def cells(self) -> tuple[str, ...]:
        """The row for people, in the order of `COLUMNS`."""
        counts = (self.tensors, self.numbers, self.trained_tensors, self.changed_tensors)
        layer = "" if self.layer is None else str(self.layer)
        shown = [f"{count:,}" if count else "-" for count in counts]
        return (self.kind, layer, *shown, self.sha256_before[:8], self.sha256_after[:8])


@dataclass(frozen=True)
class Violation:
    """A tensor that did not do what it should."""

    name: str
    kind: Kind
    layer: int | None
    problem: Problem


@dataclass(frozen=True)
class ChangeTable:
    """What changed between two fingerprints, beside what was to be trained."""

    rows: tuple[ChangeRow, ...]
    violations: tuple[Violation, ...]

    def violations_of(self, problem: Problem) -> list[Violation]:
        """Those of one sort."""
        return [violation for violation in self.violations if violation.problem == problem]

    def check(self) -> None:
        """Make sure that nothing changed which was to stay frozen.

        Tensors that were trained and did not change are no error: an expert that got no tokens has nothing to learn.

        Raises:
            TrainingProofError: Naming the first tensors that did.
        """
        wrong = self.violations_of("changed, not trained")
        if wrong:
            raise TrainingProofError(
                f"{len(wrong)} tensors changed that were to stay frozen: {_some(each.name for each in wrong)}."
            )

    def cells(self) -> list[tuple[str, ...]]:
        """The rows for people, in the order of `COLUMNS`."""
        return [row.cells() for row in self.rows]

    def totals(self) -> dict[str, int]:
        """Tensors and numbers of the whole model: all, trained, frozen and changed."""
        names = ("tensors", "numbers", "trained_tensors", "trained_numbers", "changed_tensors", "changed_numbers")
        sums: dict[str, int] = {name: sum(getattr(row, name) for row in self.rows) for name in names}
        for unit in ("tensors", "numbers"):
            sums[f"frozen_{unit}"] = sums[unit] - sums[f"trained_{unit}"]
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a run folder and a card."""
        return {
            "version": _VERSION,
            "totals": self.totals(),
            "rows": [asdict(row) for row in self.rows],
            "violations": [asdict(violation) for violation in self.violations],
        }


def compare_fingerprints(before: Fingerprint, after: Fingerprint, *, trained: Collection[str]) -> ChangeTable:
    """What changed, by kind and layer, and whether it is what was to be trained.

    `trained` are names of tensors, of experts one by one. Another type of numbers is a change.

    Raises:
        TrainingProofError: If the two are not of the same model, or a trained name is not in it.
    """
    _check_names(before, after, trained)
    names = set(trained)
    rows: list[ChangeRow] = []
    violations: list[Violation] = []
    for (kind, layer), group in _by_kind_and_layer(before).items():
        changed = {name for name in group if _differ(before.tensors[name], after.tensors[name])}
        rows.append(_describe_group((kind, layer), group, names, changed, (before, after)))
        for name in sorted((changed ^ names) & set(group)):
            violations.append(Violation(name, kind, layer, PROBLEMS[0 if name in changed else 1]))
    return ChangeTable(tuple(rows), tuple(violations))


def _check_names(before: Fingerprint, after: Fingerprint, trained: Collection[str]) -> None:
    lost, new = before.tensors.keys() - after.tensors.keys(), after.tensors.keys() - before.tensors.keys()
    if lost or new:
        what = "lacks" if lost else "has besides"
        raise TrainingProofError(
            f"The two fingerprints are of different models: the later one {what} {_some(sorted(lost or new))}."
        )
    resized = [name for name, tensor in before.tensors.items() if tensor.size != after.tensors[name].size]
    if resized:
        raise TrainingProofError(f"The two fingerprints are of different models: other sizes of {_some(resized)}.")
    unknown = sorted(set(trained) - before.tensors.keys())
    if unknown:
        raise TrainingProofError(f"Said to be trained, but not in the model: {_some(unknown)}.")


def _by_kind_and_layer(of: Fingerprint) -> dict[tuple[Kind, int | None], list[str]]:
    """Names in the order of `KINDS` and layers, what belongs to no layer first."""
    groups: dict[tuple[Kind, int | None], list[str]] = {}
    for name, tensor in of.tensors.items():
        groups.setdefault((tensor.kind, tensor.layer), []).append(name)

    def place(group: tuple[Kind, int | None]) -> tuple[int, float]:
        return KINDS.index(group[0]), -math.inf if group[1] is None else group[1]

    return {group: groups[group] for group in sorted(groups, key=place)}


def _differ(one: TensorPrint, other: TensorPrint) -> bool:
    return (one.sha256, one.dtype) != (other.sha256, other.dtype)


def _describe_group(
    group: tuple[Kind, int | None],
    names: Sequence[str],
    trained: set[str],
    changed: set[str],
    prints: tuple[Fingerprint, Fingerprint],
) -> ChangeRow:
    def numbers(of: Iterable[str]) -> int:
        return sum(prints[0].tensors[name].size for name in of)

    trained_here = [name for name in names if name in trained]
    sha256_before, sha256_after = (_combine(names, each) for each in prints)
    return ChangeRow(
        kind=group[0],
        layer=group[1],
        tensors=len(names),
        numbers=numbers(names),
        trained_tensors=len(trained_here),
        trained_numbers=numbers(trained_here),
        changed_tensors=len(changed),
        changed_numbers=numbers(changed),
        sha256_before=sha256_before,
        sha256_after=sha256_after,
    )


def _combine(names: Iterable[str], of: Fingerprint) -> str:
    lines = "".join(f"{name} {of.tensors[name].sha256}\n" for name in sorted(names))
    return hashlib.sha256(lines.encode()).hexdigest()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
