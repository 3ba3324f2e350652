"""Experts that do not fit: they stay in their safetensors files, and those in use in a memory of a given size.

Each layer has a cache of slots, stacks of the same form as its own with fewer experts, and gives its experts
implementation the slots instead of the stacks; so products and their order are those of a model that is all in memory.
Where a batch hits more experts than there are slots, they take turns. While a layer computes, what the next one will
probably need is read; see `expert_cache`.

Shape letters: T tokens, K experts per token, S = T * K token-expert pairs, D hidden, E routed experts.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..anatomy.moe_layers import MoeLayer, find_moe_layers
from ..anatomy.profile import ExpertProfile
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from .expert_cache import ExpertCache, ExpertReader, ExpertsInFiles, Guess, Shapes
from .pairs import SortedPairs, sum_over_experts
from .stacks import IMPLEMENTATION, has_post_expert_norm

logger = logging.get_logger(__name__)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_CASTS_NOTHING = ("eager", "batched_mm")  # implementations that want rows in the dtype of the weights


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


@dataclass(frozen=True)
class PlacedLayer:
    """A layer whose experts are not plain weights: what is there of it, and its stacks by parameter name."""

    found: MoeLayer
    files: Mapping[str, ExpertsInFiles]
    shapes: Shapes

    @property
    def expert_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())


class Placing:
    """What `from_pretrained` does with experts that do not become plain weights: `take` them before the others load,
    and `install` what stands for them after.

    For messages, `option` is the argument that asks for it, `state` what it makes of the experts, `verb` how.
    """

    option: str
    state: str
    verb: str

    def __init__(self) -> None:
        self._layers: list[PlacedLayer] = []
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
        layers = [self._describe(layer, stacks) for layer in find_moe_layers(model)]
        if not self._is_needed(layers):
            return stacks
        if any(layer.shapes != layers[0].shapes for layer in layers):
            raise UnsupportedModelError(
                f"The layers have experts of different sizes, which {self.option} cannot share."
            )
        devices = {torch.device(place) for place in (device_map or {"": "cpu"}).values()}
        if len(devices) > 1:
            raise ConfigError(f"{self.option} needs a model on one device; its device_map names several.")
        self._device, self._layers = devices.pop(), layers
        for layer in layers:
            layer.found.experts._parameters.clear()
            layer.found.experts._is_hf_initialized = True  # type: ignore[assignment]
        taken = {id(stack) for layer in layers for stack in layer.files.values()}
        return {name: stack for name, stack in stacks.items() if id(stack) not in taken}

    def install(self, model: Any) -> None:
        """Put what computes with them where the experts were taken out."""
        if not self._layers:
            return
        caches = self._make_caches(self._layers)
        following: Guess | None = None
        for place, layer in reversed(list(enumerate(self._layers))):
            experts = PlacedExperts(layer, caches[place % len(caches)], following, self)
            model.get_submodule(layer.found.name).experts = experts
            following = experts.guess if experts.cache.reads_ahead else None
        self._layers = []  # the files are closed with whoever still reads them
        model.requires_grad_(False)
        model.train = partial(_train, model, self)
        model.save_pretrained = partial(_refuse, self.refusal("save it"))
        model.load_state_dict = partial(_refuse, self.refusal("load other weights into it"))

    def refusal(self, wish: str) -> CheckpointError:
        """The error of who wants what needs plain weights."""
        return CheckpointError(
            f"The experts of a model with an {self.option} {self.state}; load it without one to {wish}."
        )

    def refusal_to_train(self) -> ConfigError:
        """The error of who wants to train."""
        return ConfigError(f"A model with an {self.option} is for inference only; load it without one to train it.")

    def _is_needed(self, layers: Sequence["PlacedLayer"]) -> bool:
        """Whether anything is to be done; raises ConfigError where it cannot be."""
        raise NotImplementedError

    def _make_caches(self, layers: Sequence["PlacedLayer"]) -> list[ExpertCache]:
        """What layer i holds its experts in is number i modulo their number."""
        raise NotImplementedError

    def _describe(self, layer: MoeLayer, stacks: Mapping[str, Any]) -> "PlacedLayer":
        shapes, files = {}, {}
        for name, parameter in layer.experts.named_parameters(recurse=False):
            stack = stacks.get(f"{layer.name}.experts.{name}")
            if stack is None:
                raise CheckpointError(
                    f"{layer.name}.experts.{name} cannot {self.verb}, which keep it otherwise than as "
                    f"plain floats stacked by expert; load the model without {self.option}."
                )
            shapes[name], files[name] = (tuple(parameter.shape[1:]), parameter.dtype), stack
        return PlacedLayer(layer, files, shapes)


class Offloading(Placing):
    """For an `expert_budget`: the experts stay in their files.

    Raises:
        ConfigError: If `budget` is no size, or `profile` no expert profile.
    """

    option, state, verb = "expert_budget", "stay in their files", "stay in the checkpoint's files"

    def __init__(self, budget: int | str, profile: ExpertProfile | str | Path | None) -> None:
        super().__init__()
        self._budget = parse_budget(budget)
        if isinstance(profile, str | Path) and not Path(profile).is_file():
            raise ConfigError(f"There is no expert profile {profile}.")
        self._profile = ExpertProfile.load(profile) if isinstance(profile, str | Path) else profile

    def _is_needed(self, layers: Sequence["PlacedLayer"]) -> bool:
        if self._profile is not None:
            _check_profile(self._profile, layers)
        size, top_k = layers[0].expert_bytes, layers[0].found.top_k
        total = sum(layer.found.num_experts * layer.expert_bytes for layer in layers)
        if total <= self._budget:
            logger.warning(
                f"All routed experts ({_readable(total)}) fit in the expert_budget of {_readable(self._budget)}, so "
                "the model is an ordinary one."
            )
            return False
        if self._budget < top_k * size:
            raise ConfigError(
                f"expert_budget is {self._budget:,} bytes, and a token needs {top_k} experts of {size:,} bytes at a "
                f"time; give at least {top_k * size:,}."
            )
        return True

    def _make_caches(self, layers: Sequence["PlacedLayer"]) -> list[ExpertCache]:
        num_slots = self._budget // layers[0].expert_bytes
        num_caches = min(len(layers), num_slots // layers[0].found.top_k)
        files = {layer.found.index: layer.files for layer in layers}
        reader = ExpertReader(files, is_staged=self._device.type != "cpu")
        caches = []
        for index in range(num_caches):
            of_cache = layers[index::num_caches]
            num_here = num_slots // num_caches + (index < num_slots % num_caches)
            cache = ExpertCache(of_cache[0].shapes, num_here, reader, device=self._device, num_layers=len(of_cache))
            cache.pin(_hottest(self._profile, of_cache, num_here))
            caches.append(cache)
        logger.info(
            f"{num_slots} of {sum(layer.found.num_experts for layer in layers)} routed experts are kept in "
            f"{_readable(self._budget)} of memory; the others are read when they are used."
        )
        return caches


def place_experts(
    budget: int | str | None, profile: ExpertProfile | str | Path | None, dtype: str | None
) -> Placing | None:
    """What `from_pretrained` is asked to do with experts; None if they are to be plain weights.

    Raises:
        ConfigError: If the arguments do not go together, or one is not what it should be.
        MissingExtraError: For a `dtype` where torchao is not installed.
    """
    if dtype is None:
        if budget is not None:
            return Offloading(budget, profile)
        if profile is not None:
            raise ConfigError("expert_profile says what an expert_budget is spent on; give an expert_budget too.")
        return None
    if budget is not None or profile is not None:
        raise ConfigError("expert_dtype keeps all experts in memory, and expert_budget leaves them in files; give one.")
    from .quantized import Quantizing

    return Quantizing(dtype)


def _check_profile(profile: ExpertProfile, layers: Sequence[PlacedLayer]) -> None:
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


def _hottest(profile: ExpertProfile | None, layers: Sequence[PlacedLayer], num_slots: int) -> list[tuple[int, int]]:
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


class PlacedExperts(nn.Module):
    """Stands where a layer's experts stood; its parameters are on the meta device, to say their shape."""

    def __init__(self, layer: PlacedLayer, cache: ExpertCache, following: Guess | None, placing: Placing) -> None:
        super().__init__()
        experts: Any = layer.found.experts
        vars(self).update({name: value for name, value in vars(experts).items() if name not in vars(self)})
        for name, (shape, dtype) in layer.shapes.items():
            on_meta = torch.empty(layer.found.num_experts, *shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(on_meta, requires_grad=False))
        in_slots: Any = copy.copy(experts)
        in_slots._parameters = {name: nn.Parameter(stack, requires_grad=False) for name, stack in cache.stacks.items()}
        in_slots.num_experts = cache.num_slots
        self._placing = placing
        self.cache, self.guess, self._following = cache, Guess(layer.found, cache), following
        # to compute with some while others come; beside a GPU the reads are in its queue anyway
        self._may_split = cache.device.type == "cpu" and not has_post_expert_norm(experts)
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
            raise self._placing.refusal_to_train()
        device = self.cache.device
        if hidden_states.device != device:
            raise ConfigError(
                f"The model was moved to {hidden_states.device}, and its experts were loaded for {device}; load it "
                "with device_map instead."
            )
        chosen, num_tokens = torch.unique(top_k_index, return_counts=True)
        used = chosen.tolist()
        with self.cache.lock:
            self.guess.learn(used)
            self.cache.count(self._index, dict(zip(used, (num_tokens / len(hidden_states)).tolist(), strict=True)))
            splits = self._may_split and self._config._experts_implementation == IMPLEMENTATION
            turns = self.cache.turns(self._index, used, splits=splits)
            if len(turns) > 1:
                return self._take_turns(turns, hidden_states, top_k_index, top_k_weights)
            slots_E = self._find_slots(used, device)
            if self._following is not None:
                self._following.announce(hidden_states)
            output: Tensor = self._run(hidden_states, slots_E[top_k_index], top_k_weights)
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
        for experts, following in zip(turns, [*turns[1:], []], strict=True):
            slot_S = self._find_slots(experts, row_TD.device)[expert_S]
            self.cache.announce(self._index, following)
            if experts is turns[0] and self._following is not None:
                self._following.announce(row_TD)
            pairs = torch.nonzero(slot_S >= 0).squeeze(1)
            rows, weights = row_TD[pairs // expert_TK.shape[1]], weight_S[pairs].unsqueeze(1)
            y_SD[pairs] = self._run(rows, slot_S[pairs].unsqueeze(1), weights).to(y_SD.dtype)
        return y_SD

    def _apply(self, fn: Any, recurse: bool = True) -> "PlacedExperts":
        """Nothing to move or convert: `model.to("cpu")` of a model that is there shall be no error."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._placing.refusal("copy or pickle it")

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise self._placing.refusal("save its weights")


def count_reads(model: nn.Module) -> tuple[int, int]:
    """How often the experts of a model with an expert_budget were used, and how often one was read for that."""
    caches = {module.cache for module in model.modules() if isinstance(module, PlacedExperts)}
    return sum(cache.num_uses for cache in caches), sum(cache.num_reads for cache in caches)


def _train(model: Any, placing: Placing, mode: bool = True) -> Any:
    """What `train` of such a model does: `eval()` alone goes on working."""
    if mode:
        raise placing.refusal_to_train()
    return type(model).train(model, False)


def _refuse(error: Exception, *args: Any, **kwargs: Any) -> None:
    raise error


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
