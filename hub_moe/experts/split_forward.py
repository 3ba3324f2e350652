"""The experts of a layer of which some are trained and the others frozen: forward and backward.

`hub_moe_split` is for models that ran with `hub_moe`, and on a CPU gives the same bits as that (`cpu_forward`).
`grouped_mm_split`, which it stands for elsewhere, equals transformers' `grouped_mm`. No gradient is computed for a
frozen expert's weights. For backward the pre-activations are kept, and of the input only what chosen experts saw; where
neither input nor router need a gradient, as in the lowest trained layer, the pre-activations of chosen experts alone.

Shape letters: T tokens, K experts per token, S = T * K token-expert pairs, D hidden, F expert inner, H what the first
product gives (2F with a gate), E routed experts, C chosen ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..anatomy.moe_layers import ChosenExperts, find_chosen
from ..errors import ConfigError
from .cpu_forward import hub_moe_experts_forward, split_experts_on_cpu
from .grouped_products import Part, bias_gradient, multiply, repeat_rows, weight_gradient
from .stacks import SPLIT_IMPLEMENTATION

GROUPED_SPLIT_IMPLEMENTATION = "grouped_mm_split"
_Gradients = tuple[Tensor | None, ...]


class Stacks(NamedTuple):
    """The weights of several experts, (number of experts, in, out), and biases, (number of experts, out)."""

    up: Any
    down: Any
    up_bias: Any
    down_bias: Any


_NO_STACKS = Stacks(None, None, None, None)
_FIRST_CHOSEN = 4 + len(Stacks._fields)  # among the arguments of _ExpertPairs


@dataclass(frozen=True)
class Pairs:
    """Token-expert pairs in the order in which they are computed: by expert, chosen experts behind all frozen ones."""

    order_S: Tensor  # where in (T, K) each pair comes from
    place_S: Tensor  # where each of (T, K) went
    frozen: tuple[int, ...]  # pairs of each of E experts, 0 for a chosen one
    chosen: tuple[int, ...]  # pairs of each of C experts
    top_k: int

    @property
    def token_S(self) -> Tensor:
        """The token of each pair."""
        return self.order_S // self.top_k

    @property
    def behind(self) -> slice:
        """The rows of chosen experts."""
        return slice(sum(self.frozen), None)

    def only_chosen(self) -> "Pairs":
        """The pairs of chosen experts; places of tokens are lost."""
        return replace(self, order_S=self.order_S[self.behind], frozen=())

    def parts(self, frozen: Tensor | None, chosen: Tensor | None) -> list[Part]:
        """Stacks or biases beside their rows; empty if there are none."""
        both = ((frozen, self.frozen), (chosen, self.chosen))
        return [Part(stack, counts) for stack, counts in both if stack is not None and counts]


def sort_pairs(expert_TK: Tensor, num_experts: int, chosen: ChosenExperts | None) -> Pairs:
    """Sort the pairs once for both products; waits for the counts, since they set the shapes of what follows."""
    key_S = expert_TK.reshape(-1)
    if chosen is not None:
        key_S = key_S + num_experts * chosen.is_chosen_E[key_S]
    order_S = torch.sort(key_S).indices
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
    counts = torch.bincount(key_S, minlength=2 * num_experts).tolist()
    chosen_ids = () if chosen is None else chosen.expert_ids
    return Pairs(
        order_S=order_S,
        place_S=place_S,
        frozen=tuple(counts[:num_experts]),
        chosen=tuple(counts[num_experts + expert] for expert in chosen_ids),
        top_k=expert_TK.shape[-1],
    )


def split_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function registered in transformers' ExpertsInterface as `hub_moe_split`.

    Raises:
        ConfigError: If a frozen stack requires a gradient, which it would silently not get.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return grouped_split_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    (frozen, trained), chosen = _both_stacks(experts), find_chosen(experts)
    if chosen is None:
        return hub_moe_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    inputs = hidden_states, top_k_index, top_k_weights
    return split_experts_on_cpu(experts, frozen, trained, chosen.expert_ids, inputs)


def _both_stacks(experts: Any) -> tuple[Stacks, Stacks]:
    """The frozen ones, and those of chosen experts in the same dtype, or `_NO_STACKS`."""
    chosen, frozen_stacks = find_chosen(experts), _stacks(experts, experts)
    if any(stack is not None and stack.requires_grad for stack in frozen_stacks):
        raise ConfigError(
            "The experts are split, and a frozen stack requires a gradient, which it would not get; train chosen "
            "experts only, or call merge_experts first."
        )
    if chosen is None:
        return frozen_stacks, _NO_STACKS
    dtype = frozen_stacks.up.dtype
    return frozen_stacks, Stacks(*[stack if stack is None else stack.to(dtype) for stack in _stacks(experts, chosen)])


def grouped_split_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function registered in transformers' ExpertsInterface as `grouped_mm_split`.

    Raises:
        ConfigError: As `split_experts_forward`.
    """
    frozen_stacks, chosen_stacks = _both_stacks(experts)
    dtype, chosen = frozen_stacks.up.dtype, find_chosen(experts)
    pairs = sort_pairs(top_k_index, experts.num_experts, chosen)
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    weight_S = top_k_weights.reshape(-1)
    has_norm = experts.has_post_expert_norm
    y_SD = _apply(
        _ExpertPairs,
        hidden_states.to(dtype),
        None if has_norm else weight_S,
        activate,
        pairs,
        *frozen_stacks,
        *chosen_stacks,
    )
    if has_norm:
        y_SD = experts.post_expert_norm(y_SD) * weight_S[pairs.order_S].unsqueeze(-1)
    out_TD = _apply(_SumOfPairs, y_SD, pairs)
    return out_TD.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(SPLIT_IMPLEMENTATION, split_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(GROUPED_SPLIT_IMPLEMENTATION, grouped_split_experts_forward)


def _stacks(experts: Any, holder: Any) -> Stacks:
    """The stacks of `experts` that `holder` has: the module itself, or the chosen experts beside it."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias") if experts.has_bias else (up, "down_proj")
    stacks = Stacks(*[getattr(holder, name) for name in names], *[None] * (4 - len(names)))
    return stacks if experts.is_transposed else _turn(stacks)


def _turn(stacks: Stacks) -> Stacks:
    """The matrices transposed, as the products of a backward pass need them."""
    up, down = (stack if stack is None else stack.mT for stack in stacks[:2])
    return stacks._replace(up=up, down=down)


def _apply(function: Any, *inputs: Any) -> Tensor:
    """`torch.autograd.Function.apply`, which torch leaves untyped."""
    output: Tensor = function.apply(*inputs)
    return output


class _SumOfPairs(torch.autograd.Function):
    """Sorted pairs (S, D) to the sum of each token's K, (T, D)."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(pairs.order_S)
        ctx.top_k = pairs.top_k
        return _sum_by_token(y_SD, pairs.place_S, pairs.top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> _Gradients:
        (order_S,) = ctx.saved_tensors
        return dout_TD[order_S // ctx.top_k], None


def _sum_by_token(y_SD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
    return y_SD[place_S].view(-1, top_k, y_SD.shape[-1]).sum(1)


class _ExpertPairs(torch.autograd.Function):
    """Tokens (T, D) to the output of their experts, one row for each pair (S, D), times its weight if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_S: Tensor | None,
        activate: Callable[[Tensor], Tensor],
        pairs: Pairs,
        *stacks: Any,
    ) -> Tensor:
        frozen, chosen = Stacks(*stacks[:4]), Stacks(*stacks[4:])
        x_SD = x_TD[pairs.token_S]
        h_SH = multiply(x_SD, pairs.parts(frozen.up, chosen.up), pairs.parts(frozen.up_bias, chosen.up_bias))
        ctx.activate, ctx.layout = activate, (pairs.frozen, pairs.chosen, pairs.top_k)
        ctx.is_partial = not any(ctx.needs_input_grad[:2])
        h_kept = h_SH[pairs.behind].clone() if ctx.is_partial else h_SH
        x_kept = _keep_input(x_TD, x_SD, pairs) if any(ctx.needs_input_grad[_FIRST_CHOSEN:]) else None
        ctx.save_for_backward(x_kept, h_kept, weight_S, pairs.order_S, pairs.place_S, *stacks)
        a_SF = activate(h_SH)
        y_SD = multiply(a_SF, pairs.parts(frozen.down, chosen.down), pairs.parts(frozen.down_bias, chosen.down_bias))
        if weight_S is None:
            return y_SD
        weight_S1 = weight_S[pairs.order_S].unsqueeze(-1)
        return y_SD.mul_(weight_S1) if weight_S1.dtype == y_SD.dtype else y_SD * weight_S1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SD: Tensor) -> _Gradients:
        x_kept, h_SH, weight_S, order_S, place_S, *stacks = ctx.saved_tensors
        frozen, chosen = Stacks(*stacks[:4]), Stacks(*stacks[4:])
        pairs = Pairs(order_S, place_S, *ctx.layout)
        if ctx.is_partial:
            dy_SD, pairs = dy_SD[pairs.behind], pairs.only_chosen()
        weight_S1 = None if weight_S is None else weight_S[pairs.order_S].unsqueeze(-1)
        with torch.enable_grad():
            h_SH = h_SH.detach().requires_grad_()
            a_SF = ctx.activate(h_SH)
        da_SF = multiply(dy_SD.to(h_SH.dtype), pairs.parts(_turn(frozen).down, _turn(chosen).down))
        dweight_S = dx_TD = None
        if ctx.needs_input_grad[1]:
            biases = pairs.parts(frozen.down_bias, chosen.down_bias)
            dweight_S = _weight_gradient_of_pairs(a_SF.detach(), da_SF, dy_SD, biases)[place_S].to(weight_S.dtype)
        (dh_SH,) = torch.autograd.grad(a_SF, h_SH, da_SF if weight_S1 is None else da_SF.mul_(weight_S1))
        if ctx.needs_input_grad[0]:
            dx_SD = multiply(dh_SH, pairs.parts(_turn(frozen).up, _turn(chosen).up))
            dx_TD = _sum_by_token(dx_SD, place_S, pairs.top_k)
        dchosen = _NO_STACKS
        if any(ctx.needs_input_grad[_FIRST_CHOSEN:]):
            is_whole = x_kept.shape[0] != sum(pairs.chosen)
            x_SD = x_kept[pairs.token_S[pairs.behind]] if is_whole else x_kept
            dy_SD = dy_SD[pairs.behind] if weight_S1 is None else dy_SD[pairs.behind] * weight_S1[pairs.behind]
            rows = (x_SD, dh_SH[pairs.behind], a_SF.detach()[pairs.behind], dy_SD.to(h_SH.dtype))
            dchosen = _gradients_of_chosen(chosen, rows, pairs.chosen)
        return dx_TD, dweight_S, None, None, *_NO_STACKS, *dchosen


def _keep_input(x_TD: Tensor, x_SD: Tensor, pairs: Pairs) -> Tensor:
    """What chosen experts saw, or all tokens where those are fewer."""
    return x_SD[pairs.behind].clone() if sum(pairs.chosen) <= x_TD.shape[0] else x_TD


def _weight_gradient_of_pairs(a_SF: Tensor, da_SF: Tensor, dy_SD: Tensor, biases: Sequence[Part]) -> Tensor:
    """y . dy of each pair, without y: (a @ down) . dy = a . (dy @ down^T), and da is the latter."""
    dweight_S = (a_SF * da_SF).sum(-1, dtype=torch.promote_types(a_SF.dtype, torch.float32))
    return dweight_S + (repeat_rows(biases) * dy_SD).sum(-1) if biases else dweight_S


def _gradients_of_chosen(chosen: Stacks, rows: Sequence[Tensor], counts: tuple[int, ...]) -> Stacks:
    """From the rows of chosen experts: input, gradient of the pre-activations, activations, gradient of the output."""
    x_SD, dh_SH, a_SF, dy_SD = rows
    return Stacks(
        up=weight_gradient(chosen.up, x_SD, dh_SH, counts),
        down=weight_gradient(chosen.down, a_SF, dy_SD, counts),
        up_bias=None if chosen.up_bias is None else bias_gradient(dh_SH, counts),
        down_bias=None if chosen.down_bias is None else bias_gradient(dy_SD, counts),
    )
