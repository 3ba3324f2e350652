"""Records what a model's routers decide: tokens, gate mass and output norms of every expert.

Shape letters: B batch, L sequence, T = B * L tokens, D hidden, E routed experts, K experts per token.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .moe_layers import MoeLayer, find_moe_layers

_PAIRS_AT_ONCE = 16_384  # of a token and one of its experts, in the pass that measures output norms


class LayerRouting:
    """What the router of one layer decided, summed over every token seen; lives on the layer's device.

    `tokens_E` is int64; the sums over the tokens of an expert are float64: `gate_mass_E` of the routing weights that
    were used, `output_norm_E` of the L2 norm of the expert's output, and `gated_output_norm_E` of norm times weight
    (the saliency of arXiv:2510.13999 times the tokens). The last two are None where norms are not recorded. `choices`
    holds one int32 (T, K) tensor a forward, -1 at padding, where choices are kept.
    """

    def __init__(self, layer: MoeLayer, *, keep_choices: bool, output_norms: bool) -> None:
        self.layer = layer
        self.tokens_E = torch.zeros(layer.num_experts, dtype=torch.int64)
        self.gate_mass_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.output_norm_E = torch.zeros_like(self.gate_mass_E) if output_norms else None
        self.gated_output_norm_E = torch.zeros_like(self.gate_mass_E) if output_norms else None
        self.choices: list[Tensor] | None = [] if keep_choices else None

    def add(self, chosen_TK: Tensor, weights_TK: Tensor, *, kept_T: Tensor | None, norms_TK: Tensor | None) -> None:
        """Count what one forward decided, but for tokens where the bool `kept_T` is False. Never waits for a GPU."""
        with torch.inference_mode(False):  # sums made in inference mode could not grow outside of it
            self._move_to(chosen_TK.device)
        ones_TK = torch.ones_like(chosen_TK, dtype=torch.int64)
        self._scatter(self.tokens_E, chosen_TK, ones_TK, kept_T)
        self._scatter(self.gate_mass_E, chosen_TK, weights_TK, kept_T)
        if norms_TK is not None and self.output_norm_E is not None and self.gated_output_norm_E is not None:
            self._scatter(self.output_norm_E, chosen_TK, norms_TK, kept_T)
            self._scatter(self.gated_output_norm_E, chosen_TK, norms_TK.double() * weights_TK, kept_T)
        if self.choices is not None:
            marked_TK = chosen_TK if kept_T is None else torch.where(kept_T[:, None], chosen_TK, -1)
            self.choices.append(marked_TK.to(torch.int32, copy=True))

    @staticmethod
    def _scatter(sums_E: Tensor, chosen_TK: Tensor, values_TK: Tensor, kept_T: Tensor | None) -> None:
        if kept_T is not None:  # chosen by `where`: what a router makes of padding may be NaN
            values_TK = torch.where(kept_T[:, None], values_TK, 0)
        sums_E.scatter_add_(0, chosen_TK.flatten(), values_TK.flatten().to(sums_E.dtype))

    def _move_to(self, device: torch.device) -> None:
        if self.tokens_E.device == device:
            return
        self.tokens_E, self.gate_mass_E = self.tokens_E.to(device), self.gate_mass_E.to(device)
        if self.output_norm_E is not None and self.gated_output_norm_E is not None:
            self.output_norm_E = self.output_norm_E.to(device)
            self.gated_output_norm_E = self.gated_output_norm_E.to(device)


class Routing:
    """The routing of every layer of a model, as `record_routing` watches it.

    `layers` are in the model's order, `num_parameters` are all of the model, `num_per_expert` those of one expert.
    """

    def __init__(self, model: Any, *, keep_choices: bool, output_norms: bool) -> None:
        self.layers = [
            LayerRouting(layer, keep_choices=keep_choices, output_norms=output_norms)
            for layer in find_moe_layers(model)
        ]
        first = self.layers[0].layer
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_per_expert = (
            sum(stack.numel() for stack in first.experts.parameters(recurse=False)) // first.num_experts
        )
        self._model_type = model.config.get_text_config(decoder=True).model_type
        self._with_norms = output_norms
        self._is_paused = False
        self._depth = 0
        self._mask_BL: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Record nothing inside: for a teacher's or a reference's passes through the same model."""
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was_paused

    def open(self, model: Any) -> None:
        """Hook into everything around the decoder's layers: the model, its decoder, wrappers such as peft's.

        Any of them may be the one that is called, and checkpointing, which repeats layers, calls none.
        """
        for module in _around_layers(model, [routing.layer for routing in self.layers]):
            self._hooks.append(module.register_forward_pre_hook(self._make_begin(module), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._end, always_call=True))
        for routing in self.layers:
            hook = self._make_experts_hook(routing)
            self._hooks.append(routing.layer.experts.register_forward_pre_hook(hook, with_kwargs=True))

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _make_begin(self, module: nn.Module) -> Callable[..., None]:
        names = list(inspect.signature(module.forward).parameters)
        place = names.index("attention_mask") if "attention_mask" in names else None

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._depth += 1
            mask = kwargs.get("attention_mask")
            if mask is None and place is not None and place < len(args):
                mask = args[place]
            if mask is None or self._is_paused or self._mask_BL is not None:
                return
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise UnsupportedModelError(
                    "Recording routing needs an attention_mask of shape (batch, length) or none; other masks do not "
                    "say which tokens are padding."
                )
            self._mask_BL = mask

        return begin

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._mask_BL = None
            self._kept.clear()

    def _make_experts_hook(self, routing: LayerRouting) -> Callable[..., None]:
        @torch.no_grad()
        def observe(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_paused or self._depth == 0:  # outside of a forward, checkpointing repeats a part of it
                return
            hidden_TD, chosen_TK, weights_TK = self._read(routing.layer, [*args, *kwargs.values()])
            kept_T = self._kept_tokens(len(chosen_TK), chosen_TK.device)
            norms_TK = _measure_norms(experts, hidden_TD, chosen_TK) if self._with_norms else None
            routing.add(chosen_TK, weights_TK, kept_T=kept_T, norms_TK=norms_TK)

        return observe

    def _read(self, layer: MoeLayer, inputs: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (T, D), chosen experts (T, K) and their weights (T, K) from what the experts are given."""
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if (
            len(tensors) != 3
            or len(shapes[1]) != 2
            or shapes[1] != shapes[2]
            or shapes[0] != (shapes[1][0], tensors[0].shape[-1])
            or tensors[1].is_floating_point()
            or not tensors[2].is_floating_point()
        ):
            raise UnsupportedModelError(
                f"Model type {self._model_type!r} gives the experts of {layer.name} something else than hidden states, "
                "chosen experts and their weights, which is what recording routing reads."
            )
        return tensors[0], tensors[1], tensors[2]

    def _kept_tokens(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """False at padding, bool of shape (T,). Tokens are the last columns of the mask: in decoding, in MTP layers."""
        if self._mask_BL is None:
            return None
        if num_tokens not in self._kept:
            batch, length = self._mask_BL.shape
            if num_tokens % batch or num_tokens // batch > length:
                raise UnsupportedModelError(
                    f"The experts of model type {self._model_type!r} see {num_tokens} tokens, which an attention_mask "
                    f"of shape ({batch}, {length}) does not describe."
                )
            self._kept[num_tokens] = (self._mask_BL[:, -(num_tokens // batch) :] != 0).flatten()
        return self._kept[num_tokens].to(device, non_blocking=True)


def _around_layers(model: nn.Module, layers: list[MoeLayer]) -> list[nn.Module]:
    names = {""}
    for layer in layers:
        container, _, _ = layer.name.partition(f".{layer.index}")  # model.layers
        parts = container.split(".")[:-1]
        names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return [model.get_submodule(name) for name in sorted(names)]


@contextmanager
def record_routing(model: nn.Module, keep_choices: bool = False, *, output_norms: bool = False) -> Iterator[Routing]:
    """Watch the routers of a transformers model for as long as the context lasts.

    Counted is each token that passes through the forward of `model`, or of its decoder alone, in training and
    evaluation alike. Gradient checkpointing repeats the layers in the backward pass, outside of any forward, and is not
    counted again. `generate` counts the prompt once and each further token once (the last one is never routed); a
    sequence that ends before others of its batch goes on being counted, since transformers' mask goes on too. Padding,
    told by a two-dimensional `attention_mask`, is left out; without a mask every token counts, which is right for
    packed rows (give them `use_cache=False`: with a cache, transformers lets packed documents see each other).

    Args:
        model: With experts that `find_moe_layers` finds.
        keep_choices: Keep the chosen experts of every token.
        output_norms: Sum up the norms of the experts' outputs. They are computed exactly, by giving every pair of a
            token and one of its experts to the layer's experts once more, which costs about as much as the experts do.

    Raises:
        UnsupportedModelError: If the model has no experts that hub_moe finds, or, in a forward, if the experts are not
            given `(hidden states, chosen experts, weights)` or the mask is of another shape.
    """
    routing = Routing(model, keep_choices=keep_choices, output_norms=output_norms)
    try:
        routing.open(model)
        yield routing
    finally:
        routing.close()


def _measure_norms(experts: Any, hidden_TD: Tensor, chosen_TK: Tensor) -> Tensor:
    """L2 norm of each chosen expert's output, float32 (T, K), by whatever implementation the model has.

    Each pair becomes a token with one expert of weight 1. `forward` is called past the hooks, ours among them.
    """
    top_k = chosen_TK.shape[1]
    norms = []
    for hidden_tD, chosen_tK in zip(
        hidden_TD.split(max(1, _PAIRS_AT_ONCE // top_k)), chosen_TK.split(max(1, _PAIRS_AT_ONCE // top_k)), strict=True
    ):
        ones_P1 = torch.ones(chosen_tK.numel(), 1, dtype=hidden_TD.dtype, device=hidden_TD.device)
        outputs_PD = experts.forward(hidden_tD.repeat_interleave(top_k, dim=0), chosen_tK.reshape(-1, 1), ones_P1)
        norms.append(torch.linalg.vector_norm(outputs_PD.float(), dim=-1).view_as(chosen_tK))
    return torch.cat(norms)
