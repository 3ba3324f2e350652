"""Slots for experts that stay in their files: those in use are there, and what is next is read by the system meanwhile.

The experts that may leave are ranked by how often they were used, where each pass through a layer counts for less as
others follow; so a prompt that uses all experts does not throw out the ones that it uses most. What comes next is
announced to the operating system, which reads it into its page cache while the processor computes: no thread of ours
competes with the products, nothing leaves a slot for a guess, and one that is wrong costs a read.

Beside a GPU the slots lie on it, and reads pass through a page-locked buffer for each thread. This has not been run on
a GPU; all of it but the locking, and the waiting for copies, is run on the CPU by the tests.
"""

import math
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ..anatomy.moe_layers import MoeLayer

Key = tuple[int, int]  # layer, expert
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of one expert, by the name of the stack

NUM_READERS = 4  # reads side by side: what keeps a disk busy; from the page cache two already are as fast as memory
_FADING = 0.95  # what a use counts for after one more pass through the layers of a cache
_LARGEST = 1e100
_FIRST_CHANCE, _LEAST_CHANCE, _LEARNING_RATE = 0.5, 0.6, 1 / 16  # of a guess that it is right


class ExpertsInFiles(Protocol):
    """A parameter that stacks a layer's experts, still in its files."""

    def announce(self, expert: int) -> None:
        """Let the system start to read one expert, if it can; returns at once."""
        ...

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """Write one expert's values into `target`."""
        ...

    def check_unchanged(self, expert: int) -> None:
        """Raise CheckpointError if a file that the expert lies in was changed since it was opened."""
        ...


class SlotFiller(Protocol):
    """What gets experts into slots. `reads_ahead`: whether some of it goes on while the processor computes."""

    reads_ahead: bool

    def announce(self, key: Key) -> None:
        """Begin with what goes on meanwhile; returns at once."""
        ...

    def fill(self, places: Sequence[tuple[Key, Mapping[str, Tensor]]]) -> None:
        """Fill a slot for each expert; when this returns or raises, nothing is written any more."""
        ...


class ExpertReader:
    """Reads experts of some layers into slots, several at a time; its threads end with it."""

    reads_ahead = True

    def __init__(self, files: Mapping[int, Mapping[str, ExpertsInFiles]], *, is_staged: bool) -> None:
        self._files = files
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="expert-reader")
        self._staging = threading.local() if is_staged else None

    def announce(self, key: Key) -> None:
        """Let the system start to read an expert; returns at once."""
        layer, expert = key
        for stack in self._files[layer].values():
            stack.announce(expert)

    def fill(self, places: Sequence[tuple[Key, Mapping[str, Tensor]]]) -> None:
        """Fill a slot for each expert, on the GPU stream of who asks.

        Raises:
            CheckpointError: If a file has changed or become too short.
        """
        reads: list[Future[None]] = []
        stream = _current_stream(places[0][1])
        try:
            for place in places[1:]:
                reads.append(self._pool.submit(self._read, *place, stream))
            self._read(*places[0], stream)  # this thread has nothing else to do
            for read in reads:
                read.result()
        finally:
            wait(reads)

    def _read(self, key: Key, target: Mapping[str, Tensor], stream: Any) -> None:
        layer, expert = key
        self.announce(key)
        for name, stack in self._files[layer].items():
            stack.check_unchanged(expert)
            if self._staging is None:
                stack.fill_expert(expert, target[name])
                continue
            buffer = self._buffer(name, target[name])
            stack.fill_expert(expert, buffer)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                target[name].copy_(buffer, non_blocking=True)
                self._staging.is_free[name] = stream.record_event() if stream is not None else None

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """This thread's own, once the copy out of it is done."""
        staging: Any = self._staging
        if not hasattr(staging, "buffers"):
            staging.buffers, staging.is_free = {}, {}
        if name not in staging.buffers:
            is_pinned = like.device.type == "cuda"
            staging.buffers[name] = torch.empty(like.shape, dtype=like.dtype, pin_memory=is_pinned)
        if staging.is_free.get(name) is not None:
            staging.is_free[name].synchronize()
        buffer: Tensor = staging.buffers[name]
        return buffer


def _current_stream(target: Mapping[str, Tensor]) -> Any:
    device = next(iter(target.values())).device
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class ExpertCache:
    """Slots for the experts of some layers: `pinned` ones stay, of the others those used most of late.

    Whoever computes with what it `hold`s has the `lock` until it is done.

    `num_uses` counts experts that a layer asked for, `num_reads` those that were read for it.
    """

    def __init__(
        self, shapes: Shapes, num_slots: int, reader: "SlotFiller", *, device: torch.device, num_layers: int
    ) -> None:
        self.num_slots = num_slots
        self.num_uses = self.num_reads = 0
        self.stacks = {
            name: torch.empty(num_slots, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self.lock = threading.Lock()
        self._reader = reader
        self._slots: dict[Key, int] = {}
        self._free = list(range(num_slots))
        self._pinned: frozenset[Key] = frozenset()
        self._heat: dict[Key, float] = {}
        self._weight = 1.0  # of a use now
        self._growth = _FADING ** (-1 / num_layers)

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return next(iter(self.stacks.values())).device

    @property
    def reads_ahead(self) -> bool:
        """Whether it helps to `announce`."""
        return self._reader.reads_ahead

    def pin(self, keys: Sequence[Key]) -> None:
        """Read experts that never leave."""
        self._pinned = frozenset(keys)
        self._read([(key, self._free.pop()) for key in keys])

    def count(self, layer: int, shares: Mapping[int, float]) -> None:
        """That a pass through a layer uses each of these experts for such a share of its tokens."""
        self._weight *= self._growth
        for expert, share in shares.items():
            self._heat[layer, expert] = self._heat.get((layer, expert), 0.0) + share * self._weight
        if self._weight > _LARGEST:
            self._heat = {key: heat / self._weight for key, heat in self._heat.items()}
            self._weight = 1.0

    def turns(self, layer: int, experts: Sequence[int], *, splits: bool) -> list[list[int]]:
        """Parts of `experts` that find room at the same time, each of which can come while the one before it computes.

        First those that are there; of the others those used most come last, and so stay.

        Args:
            splits: Whether those that are there are a part of their own though there is room for all.
        """
        keys = [(layer, expert) for expert in experts]
        room = self.num_slots - len(self._pinned)
        fits = sum(key not in self._pinned for key in keys) <= room
        if fits and not (splits and self.reads_ahead):
            return [list(experts)]
        here = {key for key in keys if key in self._slots}
        missing = sorted((key for key in keys if key not in here), key=lambda key: self._heat.get(key, 0.0))
        size = math.ceil(room / 2) if self.reads_ahead and not fits else room
        turns = [sorted(here)] + [missing[start : start + size] for start in range(0, len(missing), size)]
        return [[expert for _, expert in turn] for turn in turns if turn]

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those that are in no slot."""
        return [expert for expert in experts if (layer, expert) not in self._slots]

    def announce(self, layer: int, experts: Iterable[int]) -> None:
        """Let the system start to read those that are missing; returns at once."""
        for expert in self.missing(layer, experts):
            self._reader.announce((layer, expert))

    def hold(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The slots of experts that find room together; those that are missing are read.

        Raises:
            CheckpointError: If a file has changed or become too short.
        """
        keys = [(layer, expert) for expert in experts]
        self.num_uses += len(keys)
        missing = [key for key in keys if key not in self._slots]
        self._read([(key, self._find_slot(but_not=keys)) for key in missing])
        return [self._slots[key] for key in keys]

    def _slot(self, slot: int) -> dict[str, Tensor]:
        return {name: stack[slot] for name, stack in self.stacks.items()}

    def _find_slot(self, but_not: Collection[Key]) -> int:
        """An empty one, or that of the expert used least."""
        if self._free:
            return self._free.pop()
        leaving = (key for key in self._slots if key not in self._pinned and key not in but_not)
        return self._slots.pop(min(leaving, key=lambda key: self._heat.get(key, 0.0)))

    def _read(self, places: list[tuple[Key, int]]) -> None:
        """All or nothing: after an error the slots are free."""
        try:
            if places:
                self._reader.fill([(key, self._slot(slot)) for key, slot in places])
            self._slots.update(places)
            self.num_reads += len(places)
        finally:
            self._free.extend(slot for key, slot in places if key not in self._slots)


class Guess:
    """Of what a layer will need: its router on the input of the layer before it (arXiv:2312.17238 section 3.2).

    How often an expert was really needed that stood first, second, ... in the guess and was not there is learnt in use,
    and only what is rather needed than not is read.
    """

    def __init__(self, layer: MoeLayer, cache: ExpertCache) -> None:
        self._layer, self._cache = layer, cache
        matrices = [stack for stack in layer.router.parameters() if stack.dim() == 2]
        self._is_known = len(matrices) == 1 and matrices[0].shape[0] == layer.num_experts
        self._chances = [_FIRST_CHANCE] * layer.top_k
        self._missing: dict[int, int] = {}  # of the last guess, by its place there

    def announce(self, hidden_TD: Tensor) -> None:
        """Let the system read it, if there are few tokens; many use most experts anyway."""
        layer, cache = self._layer, self._cache
        if not self._is_known or len(hidden_TD) * layer.top_k > cache.num_slots // 2:
            return
        weight_ED = next(stack for stack in layer.router.parameters() if stack.dim() == 2)
        if weight_ED.shape[1] != hidden_TD.shape[1] or weight_ED.device != hidden_TD.device:
            return
        score_TE = functional.linear(hidden_TD.to(weight_ED.dtype), weight_ED)
        if layer.balancing_bias is not None:
            score_TE = score_TE.sigmoid() + layer.balancing_bias.reshape(-1)
        ranking = score_TE.topk(layer.top_k).indices.tolist()
        places = {expert: place for row in ranking for place, expert in reversed(list(enumerate(row)))}
        self._missing = {expert: places[expert] for expert in cache.missing(layer.index, places)}
        cache.announce(
            layer.index, [expert for expert, place in self._missing.items() if self._chances[place] > _LEAST_CHANCE]
        )

    def learn(self, used: Collection[int]) -> None:
        """Which experts it really were."""
        missing, self._missing = self._missing, {}
        for expert, place in missing.items():
            self._chances[place] += ((expert in used) - self._chances[place]) * _LEARNING_RATE
