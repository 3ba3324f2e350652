"""A cache layer with room behind its last token: a step writes its latents there instead of copying all before it.

transformers' DynamicLayer concatenates at every step, so reading a context of 8192 tokens costs three times the bytes
and, in fresh memory, as many page faults; in decoding with absorbed weights that was the larger half of the time.

Shape letters: B batch, L new tokens, S cached tokens, P places for tokens, C latent (kv_lora_rank), R rotary part.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# room for an eighth more tokens: copying, when it runs out, adds eight reads and writes of a token to each new one
_SMALLEST_ROOM = 64
_ROOM_SHARE = 8


class Places(NamedTuple):
    """Where each row's new tokens go, `index_BL` (int64), all of them before `end`: behind the row's own last token."""

    index_BL: Tensor
    end: int


class LatentLayer(DynamicLayer):
    """Latents as keys (B, 1, S, C), rotated keys as values (B, 1, S, R), side by side in one buffer (B, 1, P, C + R).

    What was handed out never changes: a place is written once, and after `crop`, reordering or anything else that
    replaces the tensors the next step copies them, as DynamicLayer always does. So it does where gradients are on, in
    compiled graphs and for prompts. Only with `places` are those of its own last steps written again, so that rows of
    a batch may take back as many tokens as each likes; what lies behind a row's end is for the mask to hide.
    """

    keys: Tensor
    values: Tensor
    places: Places | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffer_B1PX: Tensor | None = None
        self._written = 0  # places of the buffer that were ever written

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new tokens' latents (B, 1, L, C) and rotated keys (B, 1, L, R); returns those of all tokens."""
        if self.places is not None:
            return self._write_at(self.places, key_states, value_states)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._continues(key_states, value_states):
            self._buffer_B1PX = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        split = key_states.shape[-1]
        if not self._has_room(end):
            self._move(places=end + max(_SMALLEST_ROOM, end // _ROOM_SHARE))
        buffer_B1PX = self._buffer_B1PX
        assert buffer_B1PX is not None
        if are_side_by_side(key_states, value_states):
            buffer_B1PX[:, :, start:end] = join(key_states, value_states)
        else:
            buffer_B1PX[:, :, start:end, :split] = key_states
            buffer_B1PX[:, :, start:end, split:] = value_states
        self._written = end
        self.keys, self.values = buffer_B1PX[:, :, :end, :split], buffer_B1PX[:, :, :end, split:]
        return self.keys, self.values

    def _write_at(self, places: Places, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write each row's tokens at its own places; returns everything before `places.end`."""
        start, split, end = self.keys.shape[2], key_states.shape[-1], places.end
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # not in place, as in a plain step
            self._buffer_B1PX = None
            room = (0, 0, 0, max(0, end - start))
            self.keys = _put(nn.functional.pad(self.keys[:, :, :end], room), places, key_states)
            self.values = _put(nn.functional.pad(self.values[:, :, :end], room), places, value_states)
            return self.keys, self.values
        if not self._has_room(end):
            self._move(places=max(start, end) + max(_SMALLEST_ROOM, end // _ROOM_SHARE))
        buffer_B1PX = self._buffer_B1PX
        assert buffer_B1PX is not None
        _put(buffer_B1PX, places, torch.cat((key_states, value_states), dim=-1))
        self._written = end
        self.keys, self.values = buffer_B1PX[:, :, :end, :split], buffer_B1PX[:, :, :end, split:]
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens, and the buffer."""
        self._buffer_B1PX = None
        super().reset()

    def _continues(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether there are tokens to add to, of the same kind."""
        if self.get_seq_length() == 0:
            return False
        return _is_alike(self.keys, key_states) and _is_alike(self.values, value_states)

    def _has_room(self, end: int) -> bool:
        """Whether the tensors are still this layer's own views, up to the last place written, with places behind."""
        buffer_B1PX = self._buffer_B1PX
        if buffer_B1PX is None or self.keys.shape[2] != self._written or end > buffer_B1PX.shape[2]:
            return False
        if buffer_B1PX.is_inference() != torch.is_inference_mode_enabled():
            return False  # torch forbids writing to one kind in the mode of the other
        return self.keys.data_ptr() == buffer_B1PX.data_ptr() and are_side_by_side(self.keys, self.values)

    def _move(self, *, places: int) -> None:
        """Copy the tokens to a new buffer."""
        batch, heads, start, split = self.keys.shape
        buffer_B1PX = self.keys.new_empty(batch, heads, places, split + self.values.shape[-1])
        buffer_B1PX[:, :, :start, :split] = self.keys
        buffer_B1PX[:, :, :start, split:] = self.values
        buffer_B1PX[:, :, start:] = 0  # rows at different places read each other's room, and a mask does not hide NaN
        self._buffer_B1PX = buffer_B1PX


def give_room(cache: Cache, layer_idx: int) -> None:
    """Have a dynamic cache keep this layer's latents in a LatentLayer; other caches and layers are left as they are."""
    if not isinstance(cache, DynamicCache) or cache.offloading or torch.compiler.is_compiling():
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = LatentLayer
    if layer_idx < len(cache.layers) and type(cache.layers[layer_idx]) is DynamicLayer:
        layer = LatentLayer()
        layer.__dict__.update(vars(cache.layers[layer_idx]))
        cache.layers[layer_idx] = layer


def place_rows(cache: DynamicCache, places: Places | None) -> None:
    """Have the next tokens of every layer written at `places`, or after None behind the last token, as usual."""
    for index in range(len(cache.layers)):
        give_room(cache, index)
        layer = cache.layers[index]
        assert isinstance(layer, LatentLayer), "whoever places rows has seen to it that the cache is a plain one"
        layer.places = places


def _is_alike(old: Tensor, new: Tensor) -> bool:
    batch, heads, _, width = new.shape
    old_batch, old_heads, _, old_width = old.shape
    is_like = (old_batch, old_heads, old_width) == (batch, heads, width) and old.dtype is new.dtype
    return is_like and old.device == new.device


def _put(cached_B1PX: Tensor, places: Places, new_B1LX: Tensor) -> Tensor:
    """Write each row's new tokens into `cached_B1PX` at its places."""
    index_BL = places.index_BL.to(cached_B1PX.device)
    rows_B1 = torch.arange(index_BL.shape[0], device=index_BL.device)[:, None]
    cached_B1PX[rows_B1, 0, index_BL] = new_B1LX.squeeze(1)
    return cached_B1PX


def are_side_by_side(left: Tensor, right: Tensor) -> bool:
    """Whether each row of `right` follows the same row of `left` in memory, with nothing between and around."""
    *rows, width = left.shape
    *right_rows, right_width = right.shape
    strides = left.stride()
    if rows != right_rows or strides != right.stride() or strides[-2:] != (width + right_width, 1):
        return False
    return right.data_ptr() == left.data_ptr() + width * left.element_size()


def join(left: Tensor, right: Tensor) -> Tensor:
    """`torch.cat((left, right), dim=-1)`, without copying what lies side by side already."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not are_side_by_side(left, right):
        return torch.cat((left, right), dim=-1)
    return left.as_strided((*left.shape[:-1], left.shape[-1] + right.shape[-1]), left.stride())
