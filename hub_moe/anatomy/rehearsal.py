"""Runs a model without weights to see what it would allocate and compute.

A forward on the meta device executes transformers' own code on shapes alone, so what it caches and what it hands to
the attention function are facts about that code rather than formulas about the family.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from ..errors import UnsupportedModelError

# Tokens of a rehearsal, and of the two that show how a cache layer of a family's own making grows (multiples of the
# compression ratios in use).
_TOKENS = 16
_SHORT, _LONG = 128, 256
_RECORDER = "hub_moe_rehearsal"
_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a sequence: bytes for each of its last `window` tokens, and a fixed state."""

    bytes_per_token: float
    window: int | None
    fixed_bytes: int

    def size_bytes(self, tokens: int) -> int:
        """Bytes after `tokens` tokens of one sequence."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return self.fixed_bytes + round(self.bytes_per_token * kept)


@dataclass(frozen=True)
class AttentionCall:
    """One layer's softmax attention: the width of a head's query and value, and the keys it meets.

    Of the token itself and those before it a query meets the last `window` (None: all), and `extra_keys_per_token`
    more for each token of context where a layer also attends to a compressed history.
    """

    num_heads: int
    qk_dim: int
    v_dim: int
    window: int | None
    extra_keys_per_token: float

    def flops(self, context: int) -> int:
        """Of one query over `context` tokens: two products, two operations for each multiply-add."""
        keys = context if self.window is None else min(context, self.window)
        keys += round(self.extra_keys_per_token * context)
        return 2 * self.num_heads * (self.qk_dim + self.v_dim) * keys


@dataclass(frozen=True)
class Rehearsal:
    """What a forward caches, layer by layer, and the softmax attentions it runs."""

    cache: tuple[CacheLayer, ...]
    attention: tuple[AttentionCall, ...]


def rehearse(model: Any) -> Rehearsal:
    """Cache and attention of a causal language model on the meta device, in the model's dtype.

    The model is left in eval mode, with attention and experts implementations that suit the meta device. Linear
    attention and state-space layers show in the cache, as fixed state, and not among the attentions.

    Raises:
        UnsupportedModelError: If the model's forward needs real numbers.
    """
    model.eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    planned = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if all(type(layer).__module__ == DynamicCache.__module__ for layer in planned):
        cache, calls = _forward(model, _TOKENS)
        measured = [_measure(layer) for layer in cache.layers]
        extra_keys = [0.0] * len(calls)
    else:
        (short, short_calls), (cache, calls) = _forward(model, _SHORT), _forward(model, _LONG)
        measured = [_compare(*pair) for pair in zip(short.layers, cache.layers, strict=True)]
        extra_keys = [_extra_keys(*pair) for pair in zip(short_calls, calls, strict=True)]
    windows = dict(enumerate(_window(layer) for layer in cache.layers))
    return Rehearsal(
        cache=(*measured, *_state_outside_layers(cache)),
        attention=tuple(
            AttentionCall(
                num_heads=call.query.shape[1],
                qk_dim=call.query.shape[-1],
                v_dim=call.value.shape[-1],
                window=windows.get(call.layer_idx),
                extra_keys_per_token=extra,
            )
            for call, extra in zip(calls, extra_keys, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Call:
    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor


def _forward(model: Any, tokens: int) -> tuple[Any, list[_Call]]:
    """The cache after a forward over `tokens` tokens, and the attention calls it made."""
    calls = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        calls.append(_Call(module.layer_idx, query, key, value))
        batch_size, num_heads, length, _width = query.shape
        return query.new_empty(batch_size, length, num_heads, value.shape[-1]), None

    AttentionInterface.register(_RECORDER, record)
    AttentionMaskInterface.register(_RECORDER, eager_mask)
    model.set_attn_implementation(_RECORDER)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            return model(input_ids=ids, use_cache=True).past_key_values, calls
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"Model type {model.config.model_type!r} branches on values that only real weights have, so its cache "
            "cannot be measured without them."
        ) from error


def _measure(layer: Any) -> CacheLayer:
    """Of a cache layer of transformers' own: keys and values of the last tokens, and the state of a recurrence."""
    fixed = _bytes_in([getattr(layer, name, None) for name in _STATES])
    window = _window(layer)
    kept = window - 1 if window else None  # the token being computed is not kept
    tokens = min(_TOKENS, kept or _TOKENS)
    return CacheLayer((_layer_bytes(layer) - fixed) / tokens, kept, fixed)


def _compare(short: Any, long: Any) -> CacheLayer:
    """Of any cache layer whose window was full after `_SHORT` tokens: what it grew by until `_LONG`."""
    growth = (_layer_bytes(long) - _layer_bytes(short)) / (_LONG - _SHORT)
    return CacheLayer(growth, None, round(_layer_bytes(short) - growth * _SHORT))


def _extra_keys(short: _Call, long: _Call) -> float:
    return (long.key.shape[-2] - short.key.shape[-2]) / (_LONG - _SHORT) - 1


def _window(layer: Any) -> int | None:
    return getattr(layer, "sliding_window", None)


def _state_outside_layers(cache: Any) -> tuple[CacheLayer, ...]:
    size_bytes = _bytes_in([value for name, value in vars(cache).items() if name != "layers"])
    return (CacheLayer(0, None, size_bytes),) if size_bytes else ()


def _layer_bytes(layer: Any) -> int:
    return _bytes_in([value for name, value in vars(layer).items() if name[0] != "_"])


def _bytes_in(value: Any) -> int:
    """Of all tensors in nested containers; one that is there twice (keys that are also the values) counts once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors_in(value)}.values())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)
