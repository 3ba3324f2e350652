"""Experts that do not fit: they stay in their safetensors files, and those in use in a memory of a given size.

Each layer has a cache of slots, stacks of the same form as its own with fewer experts, and gives its experts
implementation the slots instead of the stacks; so products and their order are those of a model that is all in memory.
A token's experts that are not there are read first, side by side. Where a batch hits more experts than there are slots,
they take turns. Guessing what the next layer will need is not done: with a few slots per layer its last choices are
there anyway. There is no pinned copy in host memory beside a GPU.

Shape letters: T tokens, K experts per token, S = T * K token-expert pairs, D hidden, E routed experts.
"""

import copy
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..anatomy.moe_layers import MoeLayer, find_moe_layers
from ..anatomy.profile import ExpertProfile
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from .pairs import SortedPairs, sum_over_experts
from .stacks import IMPLEMENTATION

logger = logging.get_logger(__name__)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_READERS = 4  # reads side by side: what keeps a disk busy; from the page cache two already are as fast as memory
_CASTS_NOTHING = ("eager", "batched_mm")  # implementations that want rows in the dtype of the weights
_INFERENCE_ONLY = "A model with an expert_budget is for inference only; load it without one to train it."
_STAY_IN_FILES = "The experts of a model with an expert_budget stay in their files; load it without one to {}."


def parse_budget(budget: int | str) -> int:
    """Bytes of a size like 6442450944, "6GiB" (binary) or "6GB" (decimal).

    Raises:
        ConfigError: If it is none, or nothing.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        size = budget
    else:
        match = _SIZE.fullmatch(budget.strip()) if isinstance(budget, str) else None
        unit = (match[2] or "").lower() if match else ""
        size = int(float(match[1]) * (1024 if unit[1:] else 1000) ** _POWERS[unit[:1]]) if match else 0
    if size <= 0:
        raise ConfigError(
            f"expert_budget is {budget!r}; a size such as '6GiB', '512MB' or an int, the number of bytes, is needed."
        )
    return size


class ExpertsInFiles(Protocol):
    """A parameter that stacks a layer's experts, still in its files."""

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """Write one expert's values into `target`."""
        ...

    def check_unchanged(self, expert: int) -> None:
        """Raise CheckpointError if a file that the expert lies in was changed since it was opened."""
        ...


@dataclass(frozen=True)
class _Layer:
    """A layer whose experts stay in their files: what is there of it, and its stacks by parameter name."""

    found: MoeLayer
    files: Mapping[str, ExpertsInFiles]
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of one expert

    @property
    def expert_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())


class Offloading:
    """What `from_pretrained` does for its `expert_budget`: `take` the experts before weights load, `install` after.

    Raises:
        ConfigError: If `budget` is no size, or `profile` no expert profile.
    """

    def __init__(self, budget: int | str, profile: ExpertProfile | str | Path | None) -> None:
        self._budget = parse_budget(budget)
        if isinstance(profile, str | Path) and not Path(profile).is_file():
            raise ConfigError(f"There is no expert profile {profile}.")
        self._profile = ExpertProfile.load(profile) if isinstance(profile, str | Path) else profile
        self._layers: list[_Layer] = []
        self._device = torch.device("cpu")

    def take(self, model: Any, stacks: dict[str, Any], device_map: Mapping[str, Any] | None) -> dict[str, Any]:
        """Take the experts out of `model`, which is on the meta device, and of `stacks`, if they do not fit.

        Args:
            stacks: What the checkpoint holds of experts, by parameter name.
            device_map: Where the model goes.

        Returns:
            Those of `stacks` that are to be loaded.

        Raises:
            CheckpointError: If the checkpoint keeps experts in another form than plain stacks of them.
            ConfigError: If the budget is too small for one token, the profile is of another model, or the model goes
                to several devices.
            UnsupportedModelError: If the model has no experts that hub_moe finds.
        """
        layers = [_describe(layer, stacks) for layer in find_moe_layers(model)]
        if self._profile is not None:
            _check_profile(self._profile, layers)
        size = layers[0].expert_bytes
        total = sum(layer.found.num_experts * layer.expert_bytes for layer in layers)
        if total <= self._budget:
            logger.warning(
                f"All routed experts ({_readable(total)}) fit in the expert_budget of {_readable(self._budget)}, so "
                "the model is an ordinary one."
            )
            return stacks
        if any(layer.shapes != layers[0].shapes for layer in layers):
            raise UnsupportedModelError("The layers have experts of different sizes, which expert_budget cannot share.")
        top_k = layers[0].found.top_k
        if self._budget < top_k * size:
            raise ConfigError(
                f"expert_budget is {self._budget:,} bytes, and a token needs {top_k} experts of {size:,} bytes at a "
                f"time; give at least {top_k * size:,}."
            )
        devices = {torch.device(place) for place in (device_map or {"": "cpu"}).values()}
        if len(devices) > 1:
            raise ConfigError("expert_budget needs a model on one device; its device_map names several.")
        self._device, self._layers = devices.pop(), layers
        for layer in layers:
            layer.found.experts._parameters.clear()
            layer.found.experts._is_hf_initialized = True  # type: ignore[assignment]
        taken = {id(stack) for layer in layers for stack in layer.files.values()}
        return {name: stack for name, stack in stacks.items() if id(stack) not in taken}

    def install(self, model: Any) -> None:
        """Put what reads from the files where the experts were taken out, and the experts that stay into memory."""
        if not self._layers:
            return
        num_slots = self._budget // self._layers[0].expert_bytes
        num_caches = min(len(self._layers), num_slots // self._layers[0].found.top_k)
        readers = ThreadPoolExecutor(_READERS, thread_name_prefix="expert-reader")
        for index in range(num_caches):
            layers = self._layers[index::num_caches]
            cache = _Cache(layers, num_slots // num_caches + (index < num_slots % num_caches), readers)
            cache.allocate(self._device, _hottest(self._profile, layers, cache.num_slots))
            for layer in layers:
                model.get_submodule(layer.found.name).experts = OffloadedExperts(layer, cache)
        model.requires_grad_(False)
        model.train = partial(_train, model)
        model.save_pretrained = partial(_refuse, CheckpointError(_STAY_IN_FILES.format("save it")))
        model.load_state_dict = partial(_refuse, CheckpointError(_STAY_IN_FILES.format("load other weights into it")))
        logger.info(
            f"{num_slots} of {sum(layer.found.num_experts for layer in self._layers)} routed experts are kept in "
            f"{_readable(self._budget)} of memory; the others are read when they are used."
        )


def _describe(layer: MoeLayer, stacks: Mapping[str, Any]) -> _Layer:
    shapes, files = {}, {}
    for name, parameter in layer.experts.named_parameters(recurse=False):
        stack = stacks.get(f"{layer.name}.experts.{name}")
        if stack is None:
            raise CheckpointError(
                f"{layer.name}.experts.{name} cannot stay in the checkpoint's files, which keep it otherwise than as "
                "plain floats stacked by expert; load the model without expert_budget."
            )
        shapes[name], files[name] = (tuple(parameter.shape[1:]), parameter.dtype), stack
    return _Layer(layer, files, shapes)


def _check_profile(profile: ExpertProfile, layers: Sequence[_Layer]) -> None:
    for layer in layers:
        for domain in profile.domains.values():
            profiled = domain.layers.get(layer.found.index)
            if profiled is None and layer.found.is_mtp:
                continue
            if profiled is None or len(profiled.tokens) != layer.found.num_experts:
                raise ConfigError(
                    f"The expert profile of {profile.model} is not of this model: layer {layer.found.index} has "
                    f"{layer.found.num_experts} experts, and in the profile {len(profiled.tokens) if profiled else 0}."
                )


def _hottest(profile: ExpertProfile | None, layers: Sequence[_Layer], num_slots: int) -> list[tuple[int, int]]:
    """`(layer, expert)` of those that never leave: the most used ones, but for slots that the others take turns in."""
    if profile is None:
        return []
    shares: dict[tuple[int, int], float] = {}
    for layer in layers:
        for domain in profile.domains.values():
            profiled = domain.layers.get(layer.found.index)
            for expert, share in enumerate(profiled.token_shares if profiled else ()):
                shares[layer.found.index, expert] = shares.get((layer.found.index, expert), 0.0) + share
    num_in_turns = max(layers[0].found.top_k, num_slots // 4)
    return sorted(shares, key=lambda key: (-shares[key], key))[: num_slots - num_in_turns]


class _Cache:
    """Slots for the experts of some layers: `pinned` ones stay, of the others those used last."""

    def __init__(self, layers: Sequence[_Layer], num_slots: int, readers: ThreadPoolExecutor) -> None:
        self.num_slots = num_slots
        self.lock = threading.RLock()
        self.stacks: dict[str, Tensor] = {}
        self.num_uses = self.num_reads = 0
        self._shapes = layers[0].shapes
        self._layers = {layer.found.index: layer for layer in layers}
        self._readers = readers
        self._slots: dict[tuple[int, int], int] = {}
        self._free = list(range(num_slots))
        self._recent: OrderedDict[tuple[int, int], None] = OrderedDict()  # those that may leave, the next one first
        self._pinned: frozenset[tuple[int, int]] = frozenset()

    def allocate(self, device: torch.device, pinned: Sequence[tuple[int, int]]) -> None:
        """Get the memory, and read the experts that stay."""
        for name, (shape, dtype) in self._shapes.items():
            self.stacks[name] = torch.empty(self.num_slots, *shape, dtype=dtype, device=device)
        self._pinned = frozenset(pinned)
        self._read([(key, self._free.pop()) for key in pinned])

    def turns(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Parts of `experts` that find room at the same time: first those that are there."""
        turn: list[int] = []
        num_moving = 0
        for expert in sorted(experts, key=lambda expert: (layer, expert) not in self._slots):
            is_moving = (layer, expert) not in self._pinned
            if num_moving + is_moving > self.num_slots - len(self._pinned):
                yield turn
                turn, num_moving = [], 0
            turn.append(expert)
            num_moving += is_moving
        yield turn

    def hold(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The slots of experts that find room together; those that are missing are read.

        Raises:
            CheckpointError: If a file has changed or become too short.
        """
        keys = [(layer, expert) for expert in experts]
        missing = [key for key in keys if key not in self._slots]
        for key in keys:
            if key in self._recent:
                self._recent.move_to_end(key)
        self._read([(key, self._free.pop() if self._free else self._evict()) for key in missing])
        self._recent.update(dict.fromkeys(missing))
        self.num_uses += len(keys)
        self.num_reads += len(missing)
        return [self._slots[key] for key in keys]

    def _evict(self) -> int:
        oldest, _ = self._recent.popitem(last=False)
        return self._slots.pop(oldest)

    def _read(self, places: list[tuple[tuple[int, int], int]]) -> None:
        """All or nothing: after an error the slots are free."""
        reads: list[Future[None]] = []
        try:
            if len(places) == 1:
                self._read_one(places[0])
            else:
                reads += [self._readers.submit(self._read_one, place) for place in places]
                for read in reads:
                    read.result()
            self._slots.update(places)
        finally:
            wait(reads)
            self._free.extend(slot for key, slot in places if key not in self._slots)

    def _read_one(self, place: tuple[tuple[int, int], int]) -> None:
        (layer, expert), slot = place
        for name, stack in self._layers[layer].files.items():
            stack.check_unchanged(expert)
            stack.fill_expert(expert, self.stacks[name][slot])


class OffloadedExperts(nn.Module):
    """Stands where a layer's experts stood; its parameters are on the meta device, to say their shape."""

    def __init__(self, layer: _Layer, cache: _Cache) -> None:
        super().__init__()
        experts: Any = layer.found.experts
        vars(self).update({name: value for name, value in vars(experts).items() if name not in vars(self)})
        for name, (shape, dtype) in layer.shapes.items():
            on_meta = torch.empty(layer.found.num_experts, *shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(on_meta, requires_grad=False))
        in_slots: Any = copy.copy(experts)
        in_slots._parameters = {name: nn.Parameter(stack, requires_grad=False) for name, stack in cache.stacks.items()}
        in_slots.num_experts = cache.num_slots
        self.cache = cache
        self._index, self._num_experts, self._config = layer.found.index, layer.found.num_experts, experts.config
        self._run = in_slots.forward  # not the module itself, which is no part of the model
        self.training = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As of the experts that stood here, `(T, D)`.

        Raises:
            CheckpointError: If a file has changed or become too short.
            ConfigError: If a gradient is asked for, or the model was moved to another device.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise ConfigError(_INFERENCE_ONLY)
        device = next(iter(self.cache.stacks.values())).device
        if hidden_states.device != device:
            raise ConfigError(
                f"The model was moved to {hidden_states.device}, and its experts were loaded for {device}; load it "
                "with device_map instead."
            )
        with self.cache.lock:
            turns = list(self.cache.turns(self._index, torch.unique(top_k_index).tolist()))
            if len(turns) > 1:
                return self._take_turns(turns, hidden_states, top_k_index, top_k_weights)
            output: Tensor = self._run(hidden_states, self._find_slots(turns[0], device)[top_k_index], top_k_weights)
            return output

    def _find_slots(self, experts: Sequence[int], device: torch.device) -> Tensor:
        """The slot of each expert in memory now, int64 (E,); -1 for all but `experts`."""
        slots_E = torch.full((self._num_experts,), -1)
        held = self.cache.hold(self._index, experts)
        slots_E[torch.tensor(experts, dtype=torch.int64)] = torch.tensor(held, dtype=torch.int64)
        return slots_E.to(device)

    def _take_turns(
        self, turns: Sequence[Sequence[int]], hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """Pair by pair, each a token with one expert, and summed up as the experts implementation does."""
        num_tokens, top_k = expert_TK.shape
        stack_dtype = next(iter(self.cache.stacks.values())).dtype
        if self._config._experts_implementation == IMPLEMENTATION:
            wide = torch.promote_types(stack_dtype, torch.float32)
            y_SD = self._run_pairs(turns, hidden_TD.to(wide), expert_TK, torch.ones_like(weight_TK, dtype=wide))
            places_S = torch.arange(num_tokens * top_k, device=hidden_TD.device)
            unsorted = SortedPairs(places_S, places_S // top_k, (), num_tokens, top_k)
            return sum_over_experts(y_SD, weight_TK.reshape(-1).to(wide), unsorted).to(hidden_TD.dtype)
        exact = torch.promote_types(stack_dtype, weight_TK.dtype)
        casts = self._config._experts_implementation not in _CASTS_NOTHING
        row_dtype = torch.promote_types(exact, hidden_TD.dtype) if casts else hidden_TD.dtype
        y_SD = self._run_pairs(turns, hidden_TD.to(row_dtype), expert_TK, weight_TK).to(exact)
        return y_SD.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_TD.dtype)

    def _run_pairs(
        self, turns: Sequence[Sequence[int]], row_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """One row for each pair (S, D), in the dtype of `row`."""
        expert_S, weight_S = expert_TK.reshape(-1), weight_TK.reshape(-1)
        y_SD = row_TD.new_empty(expert_S.shape[0], row_TD.shape[-1])
        for experts in turns:
            slot_S = self._find_slots(experts, row_TD.device)[expert_S]
            pairs = torch.nonzero(slot_S >= 0).squeeze(1)
            rows, weights = row_TD[pairs // expert_TK.shape[1]], weight_S[pairs].unsqueeze(1)
            y_SD[pairs] = self._run(rows, slot_S[pairs].unsqueeze(1), weights).to(y_SD.dtype)
        return y_SD

    def _apply(self, fn: Any, recurse: bool = True) -> "OffloadedExperts":
        """Nothing to move or convert: `model.to("cpu")` of a model that is there shall be no error."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(_STAY_IN_FILES.format("copy or pickle it"))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise CheckpointError(_STAY_IN_FILES.format("save its weights"))


def count_reads(model: nn.Module) -> tuple[int, int]:
    """How often the experts of a model with an expert_budget were used, and how often one was read for that."""
    caches = {module.cache for module in model.modules() if isinstance(module, OffloadedExperts)}
    return sum(cache.num_uses for cache in caches), sum(cache.num_reads for cache in caches)


def _train(model: Any, mode: bool = True) -> Any:
    """What `train` of such a model does: `eval()` alone goes on working."""
    if mode:
        raise ConfigError(_INFERENCE_ONLY)
    return type(model).train(model, False)


def _refuse(error: Exception, *args: Any, **kwargs: Any) -> None:
    raise error


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
