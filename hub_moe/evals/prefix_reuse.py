"""Which tokens of many log-likelihood requests a model must run, and in which forwards, when shared prefixes run once.

The inputs of all requests, sorted, form a tree of tokens. It is cut into steps of one forward each: a stem, whose keys
and values later steps need, or a bush of branches on top of the stems kept so far. A bush is one packed row: nothing
is padded or copied, and each token attends to the kept stem and to its own ancestors. Nothing here needs a model.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt
from typing import NamedTuple

# What a forward costs besides its tokens, in tokens: reading the weights, above all those of many experts, and starting
# kernels. It decides how short a stem is worth a forward of its own, and how large a bush should be.
FORWARD_COST = 128
# An input that shares less than this part of itself with every other goes to the plain path.
LEAST_SHARED = 0.25
# The plain path stays unless the steps cost less than this part of it.
WORTHWHILE = 0.9


@dataclass(frozen=True)
class Scored:
    """The input of a request: the context, and the continuation without its last token.

    `num_scored` tokens of the continuation are predicted, from the last `num_scored` positions of `tokens`.
    """

    tokens: tuple[int, ...]
    num_scored: int


@dataclass(frozen=True)
class Budget:
    """What one forward may hold.

    Attributes:
        tokens: Tokens, of a stem or of a bush.
        cells: Of attention: tokens times all that come before or beside them.
        bush_tokens: A smaller bound for bushes, whose branches pay for cells that they cannot use.
    """

    tokens: int
    cells: int
    bush_tokens: int | None = None

    def count_stem_room(self, num_cached: int) -> int:
        """Tokens of a stem that fit on top of `num_cached` cached ones: at least one, or nothing would ever run."""
        root = isqrt(num_cached**2 + 4 * self.cells)
        return max(1, min(self.tokens, (root - num_cached) // 2))

    def count_bush_room(self, num_cached: int) -> int:
        """Tokens of a bush that fit."""
        room = self.count_stem_room(num_cached)
        return room if self.bush_tokens is None else max(1, min(self.bush_tokens, room))


class Score(NamedTuple):
    """Row `row` of a step predicts token `place` of the continuation of request `request`."""

    row: int
    request: int
    place: int


@dataclass(frozen=True)
class Step:
    """One forward of one packed row.

    Attributes:
        num_cached: Tokens of earlier kept steps that come before; what was kept beyond them is dropped first.
        tokens: The tokens to run, each after its ancestors.
        depths: The position of each token in its request's input.
        ends: Row of the last descendant of each token: row `i` attends to row `j` where `j <= i <= ends[j]`.
        is_kept: Whether keys and values stay for the next steps; then the tokens are one chain.
        scores: The predictions that are read off.
    """

    num_cached: int
    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]
    is_kept: bool
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Plan:
    """Steps that answer some requests, and the indices of those that the plain path answers at no greater cost."""

    steps: tuple[Step, ...]
    plain: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the steps run."""
        return sum(len(step.tokens) for step in self.steps)


def plan_requests(
    inputs: Sequence[Scored], *, budget: Budget, batch_size: int, hidden_size: int, cost_before: float = 0.0
) -> Plan:
    """Decide for each request whether sharing pays, and plan the steps of those where it does.

    Args:
        inputs: One for each request.
        budget: The largest forward; smaller bushes are tried too, and the cheapest plan is taken.
        batch_size: Inputs of one padded forward on the plain path.
        hidden_size: Of the model; attention over `6 * hidden_size` tokens costs about as much as all else.
        cost_before: What must be paid before the first step, in tokens.
    """
    paths = _find_sharing(_gather_paths(inputs))
    everything = range(len(inputs))
    if not paths:
        return Plan((), tuple(everything))
    tree = _Tree(_join_prefixes(paths))
    budgets = [Budget(budget.tokens, budget.cells, max(budget.tokens // part, 1)) for part in (1, 2, 4, 8)]
    plans = [tuple(tree.plan(smaller, FORWARD_COST)) for smaller in budgets]
    costs = [cost_before + _cost_steps(steps, hidden_size) for steps in plans]
    plain_cost = _cost_plain([len(path.tokens) for path in paths], batch_size=batch_size, hidden_size=hidden_size)
    if min(costs) > WORTHWHILE * plain_cost:
        return Plan((), tuple(everything))
    planned = {span.request for path in paths for span in path.requests}
    return Plan(plans[costs.index(min(costs))], tuple(index for index in everything if index not in planned))


def plan_steps(inputs: Sequence[Scored], *, budget: Budget, forward_cost: int = FORWARD_COST) -> Iterator[Step]:
    """The steps that predict every scored token of every request once; `Score.request` is an index into `inputs`."""
    paths = _join_prefixes(_gather_paths(inputs))
    return _Tree(paths).plan(budget, forward_cost) if paths else iter(())


@dataclass(frozen=True)
class _Path:
    """A distinct input, with the requests that have it or a part up to some token."""

    tokens: tuple[int, ...]
    requests: tuple["_Span", ...]


class _Span(NamedTuple):
    """The positions of a path that predict the continuation of `request`."""

    request: int
    start: int
    stop: int


_Group = tuple[range, int]  # neighbouring paths, and the cached tokens that they all start with


class _Tree:
    """Sorted paths and how much each shares with the one before it."""

    def __init__(self, paths: Sequence[_Path]):
        self.paths = paths
        self._shared = [0, *(_count_common(a.tokens, b.tokens) for a, b in pairwise(paths))]
        own = (len(path.tokens) - shared for path, shared in zip(paths, self._shared, strict=True))
        self._own_before = [0, *accumulate(own)]

    def plan(self, budget: Budget, forward_cost: int) -> Iterator[Step]:
        """All steps, in the order in which they must run."""
        groups = [(range(len(self.paths)), 0)]
        while groups:
            group, num_cached = groups.pop()
            steps, rest = self._grow(group, num_cached, budget, forward_cost)
            yield from steps
            groups.extend(reversed(rest))  # the last in is the first out: a kept stem stays while its branches run

    def _grow(
        self, group: range, num_cached: int, budget: Budget, forward_cost: int
    ) -> tuple[list[Step], list[_Group]]:
        """Steps that are ready, and groups that remain and must run in their order."""
        room = budget.count_bush_room(num_cached)
        size = self._count_tokens(group, num_cached)
        if size <= room:
            return self._bush([group], num_cached, num_cached), []
        common = self._count_shared_by_all(group)
        stem = common - num_cached
        # a stem that is not kept is run again by every bush on top of it
        num_bushes = -(-(size - stem) // room)
        if len(group) == 1 or 2 * stem > room or stem * (num_bushes - 1) >= max(forward_cost, 1):
            end = num_cached + min(stem, budget.count_stem_room(num_cached))
            return [self._stem(group, num_cached, end)], [(group, end)]
        return self._pack(group, num_cached, common, room - stem)

    def _pack(self, group: range, num_cached: int, common: int, room: int) -> tuple[list[Step], list[_Group]]:
        """Bushes of branches after `common`, as many in each as `room` allows; those too big for a bush are left."""
        steps: list[Step] = []
        bush: list[range] = []
        rest: list[_Group] = []
        used = 0
        for child in self._split(group, common):
            size = self._count_tokens(child, common)
            if size > room:
                rest.append((child, num_cached))
                continue
            if used + size > room:
                steps += self._bush(bush, num_cached, common)
                bush, used = [], 0
            bush.append(child)
            used += size
        return steps + self._bush(bush, num_cached, common), rest

    def _split(self, group: range, common: int) -> Iterator[range]:
        start = group.start
        for index in group[1:]:
            if self._shared[index] == common:
                yield range(start, index)
                start = index
        yield range(start, group.stop)

    def _count_tokens(self, group: range, num_cached: int) -> int:
        first = len(self.paths[group.start].tokens) - num_cached
        return first + self._own_before[group.stop] - self._own_before[group.start + 1]

    def _count_shared_by_all(self, group: range) -> int:
        return min(self._shared[group.start + 1 : group.stop], default=len(self.paths[group.start].tokens))

    def _stem(self, group: range, start: int, end: int) -> Step:
        scores = (
            Score(position - start, request, position - first)
            for index in group
            for request, first, stop in self.paths[index].requests
            for position in range(max(first, start), min(stop, end))
        )
        size = end - start
        return Step(
            num_cached=start,
            tokens=self.paths[group.start].tokens[start:end],
            depths=tuple(range(start, end)),
            ends=(size - 1,) * size,
            is_kept=True,
            scores=tuple(scores),
        )

    def _bush(self, children: Sequence[range], num_cached: int, common: int) -> list[Step]:
        """One step of all branches, or none where every token is cached already."""
        rows = _Rows(num_cached)
        for child in children:
            for index in child:
                shared = common if index == child.start else self._shared[index]
                rows.add(self.paths[index], shared)
        return [rows.finish()] if rows.tokens else []


class _Rows:
    """The rows of a bush as it is written down, path by path in sorted order."""

    def __init__(self, num_cached: int):
        self._num_cached = num_cached
        self.tokens: list[int] = []
        self._depths: list[int] = []
        self._ends: list[int] = []
        self._rows_of_path: list[int] = []
        self._scores: list[Score] = []

    def add(self, path: _Path, shared: int) -> None:
        """Write the tokens of `path` after the first `shared`, which the path before has too."""
        self._leave(shared - self._num_cached)
        start = self._num_cached + len(self._rows_of_path)
        row = len(self.tokens)
        self.tokens.extend(path.tokens[start:])
        self._depths.extend(range(start, len(path.tokens)))
        self._rows_of_path.extend(range(row, len(self.tokens)))
        self._ends.extend(range(row, len(self.tokens)))
        for request, first, stop in path.requests:
            for position in range(max(first, self._num_cached), stop):
                row = self._rows_of_path[position - self._num_cached]
                self._scores.append(Score(row, request, position - first))

    def finish(self) -> Step:
        """The step of all paths added."""
        self._leave(0)
        return Step(
            num_cached=self._num_cached,
            tokens=tuple(self.tokens),
            depths=tuple(self._depths),
            ends=tuple(self._ends),
            is_kept=False,
            scores=tuple(self._scores),
        )

    def _leave(self, depth: int) -> None:
        for row in self._rows_of_path[depth:]:
            self._ends[row] = len(self.tokens) - 1
        del self._rows_of_path[depth:]


def _gather_paths(inputs: Sequence[Scored]) -> list[_Path]:
    """Distinct inputs in sorted order, so that those with a common prefix are neighbours."""
    requests = defaultdict(list)
    for index, (tokens, num_scored) in enumerate((scored.tokens, scored.num_scored) for scored in inputs):
        requests[tokens].append(_Span(index, len(tokens) - num_scored, len(tokens)))
    return [_Path(tokens, tuple(requests[tokens])) for tokens in sorted(requests)]


def _join_prefixes(paths: Sequence[_Path]) -> list[_Path]:
    """Inputs that another continues are answered on the way: its requests move to the next path, which continues it."""
    joined: list[_Path] = []
    for path in reversed(paths):
        if joined and joined[-1].tokens[: len(path.tokens)] == path.tokens:
            joined[-1] = _Path(joined[-1].tokens, joined[-1].requests + path.requests)
        else:
            joined.append(path)
    return joined[::-1]


def _find_sharing(paths: Sequence[_Path]) -> list[_Path]:
    """Those that share enough with another; in sorted order the nearest is a neighbour."""
    common = [0, *(_count_common(a.tokens, b.tokens) for a, b in pairwise(paths)), 0]
    return [
        path for index, path in enumerate(paths) if max(common[index : index + 2]) >= LEAST_SHARED * len(path.tokens)
    ]


def _count_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix, by halving: comparing slices is faster than comparing tokens one by one."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cost_steps(steps: Iterable[Step], hidden_size: int) -> float:
    """Cost in tokens without attention."""
    return sum(
        FORWARD_COST + len(step.tokens) * (1 + (step.num_cached + len(step.tokens)) / (6 * hidden_size))
        for step in steps
    )


def _cost_plain(lengths: Sequence[int], *, batch_size: int, hidden_size: int) -> float:
    """Cost in tokens of the padded batches, longest first; a causal kernel skips half of the cells."""
    lengths = sorted(lengths, reverse=True)
    return sum(
        FORWARD_COST
        + lengths[start] * len(lengths[start : start + batch_size]) * (1 + lengths[start] / (12 * hidden_size))
        for start in range(0, len(lengths), batch_size)
    )
