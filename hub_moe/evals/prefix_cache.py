"""Runs the steps of `prefix_reuse` through a transformers model, whose cache holds the stems kept so far.

Shape letters: H heads, P kept tokens (or paths of a test), L tokens of the step, S rows that are scored, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .prefix_reuse import FORWARD_COST, Budget, Scored, Step, plan_steps

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep")
# attention that takes a mask of any shape; flash attention knows only causal rows and padding
_MASKED_ATTENTION = ("eager", "sdpa")
# rotary frequencies that change with the longest text of a batch: what is cached depends on what comes later
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_REHEARSED_TOKENS = 24
REHEARSAL_COST = 4 * FORWARD_COST  # in tokens; there are four forwards


class _StemLayer(DynamicLayer):
    """Keys and values of the kept stem, (1, H, P, ...); what a bush adds is seen by its own forward only."""

    keys: Tensor
    values: Tensor

    def __init__(self, is_keeping: bool):
        super().__init__()
        self.is_keeping = is_keeping

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those of this forward last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
        if self.is_keeping:
            self.keys, self.values = keys, values
        return keys, values


class StemCache(Cache):
    """A cache that steps share. It grows by kept steps only, and drops what lies beyond the stem of the next."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def begin(self, step: Step) -> None:
        """Make ready for the forward of `step`."""
        self.layer_class_to_replicate = partial(_StemLayer, step.is_kept)
        for layer in self.layers:
            layer.crop(step.num_cached - layer.get_seq_length())
            layer.is_keeping = step.is_kept


def run_step(model: Any, cache: StemCache, step: Step) -> tuple[list[int], Tensor]:
    """For each of `step.scores` its place in S, and the logits of shape (S, V): only rows that are scored get any."""
    rows = sorted({score.row for score in step.scores})
    place_of_row = {row: place for place, row in enumerate(rows)}
    cache.begin(step)
    device = model.device
    outputs = model(
        input_ids=torch.tensor([step.tokens], device=device),
        attention_mask=_make_mask(model, step),
        position_ids=torch.tensor([step.depths], device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.tensor(rows or [0], device=device),
    )
    return [place_of_row[score.row] for score in step.scores], outputs.logits[0, : len(rows)]


def _make_mask(model: Any, step: Step) -> Tensor:
    """(1, 1, L, P + L): a token sees the kept stem and its ancestors. Eager attention adds it, sdpa reads booleans."""
    row_L = torch.arange(len(step.tokens), device=model.device)
    end_L = torch.tensor(step.ends, device=model.device)
    is_seen_LL = (row_L[None, :] <= row_L[:, None]) & (row_L[:, None] <= end_L[None, :])
    mask = torch.nn.functional.pad(is_seen_LL, (step.num_cached, 0), value=True)[None, None]
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)


def find_obstacle(model: Any) -> str | None:
    """Why the cached prefix of this model may not be shared, or None. A structural check: nothing runs."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = getattr(model, "peft_config", {})
    if isinstance(adapters, dict) and any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
        return "its adapter puts virtual tokens before the text"
    if not any(kind.__module__.startswith(("transformers.models.", "hub_moe.")) for kind in type(base).__mro__):
        return f"{type(base).__name__} is not one of transformers' own models"
    missing = [name for name in _ARGUMENTS if name not in inspect.signature(base.forward).parameters]
    if missing:
        return f"{type(base).__name__} takes no {' and no '.join(missing)}"
    return _find_obstacle_in_config(base.config)


def _find_obstacle_in_config(config: Any) -> str | None:
    if config.is_encoder_decoder:
        return "an encoder-decoder reads the whole context at once"
    if config._attn_implementation not in _MASKED_ATTENTION:
        return (
            f"attention {config._attn_implementation!r} takes no tree-shaped mask "
            f"({' or '.join(map(repr, _MASKED_ATTENTION))} does)"
        )
    layers = DynamicCache(config=config).layers
    other = next((type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer), None)
    if other is not None:
        return f"its cache does not keep every past token ({other})"
    rope_type = next((kind for kind in _LENGTH_DEPENDENT_ROPE if kind in _find_rope_types(config)), None)
    if rope_type is not None:
        return f"its rotary positions ({rope_type!r}) depend on the length of the whole text"
    if getattr(config, "alibi", False):
        return "its position bias is made from the padding mask"
    return None


def _find_rope_types(config: Any) -> set[str]:
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return {value.get("rope_type", "default") for value in [parameters, *by_layer_type]}


def measure_difference(model: Any, tokens: Sequence[int]) -> float:
    """How far logits of a small tree lie from those of its paths run alone: norm of the difference over their norm.

    `tokens` should be those of a real text; of two dozen different ones a stem and branches are made. Float32
    stays below 1e-5; a mask, position or cache that the model does not honour shows as 1e-2 and more. Costs
    `REHEARSAL_COST`.
    """
    text = tuple(dict.fromkeys([*tokens, *range(_REHEARSED_TOKENS)]))[:_REHEARSED_TOKENS]
    third = _REHEARSED_TOKENS // 3
    paths = [text, text[: 2 * third] + text[:third], text[:third] + text[: 2 * third]]
    expected_PLV = model(torch.tensor(paths, device=model.device), use_cache=False).logits.float()
    budget = Budget(tokens=_REHEARSED_TOKENS, cells=2**20)  # a stem and two bushes, one of them with a fork
    cache, worst = StemCache(), 0.0
    for step in plan_steps([Scored(path, len(path)) for path in paths], budget=budget, forward_cost=0):
        places, logits_SV = run_step(model, cache, step)
        for score, place in zip(step.scores, places, strict=True):
            want_V = expected_PLV[score.request, score.place]
            difference_V = logits_SV[place].float() - want_V
            worst = max(worst, float(difference_V.norm() / (want_V - want_V.mean()).norm()))
    return worst
