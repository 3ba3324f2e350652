"""Experts on the CPU, forward and backward, for every family that uses transformers' ExpertsInterface.

Importing this registers `experts_implementation="hub_moe"`, which on a GPU stands for the kernels of `triton_forward`,
where those can be had, and otherwise, and while torch compiles, for transformers' own `grouped_mm`; see `stacks`. It
also registers `hub_moe_liger`, the fused experts of liger-kernel on a GPU, which is never taken unless asked for.

Pairs are sorted once; each expert's matrix is read once per product; sums run in float32 (float64 for float64 weights)
and are rounded once, at the end. For backward only the input, the pre-activations and the routing are kept. A stack's
gradient is written once, whole; a frozen stack costs none.

Shape letters: T tokens, K experts per token, S token-expert pairs, D hidden, F expert inner, H what the first product
gives (2F with a gate), E routed experts.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..errors import MissingExtraError, UnsupportedModelError
from .pairs import SortedPairs, sort_pairs_by_expert, sum_over_experts
from .products import Products, choose_products
from .stacks import (
    IMPLEMENTATION,
    LIGER_IMPLEMENTATION,
    Stacks,
    has_post_expert_norm,
    is_swiglu,
    stacks_of,
    uses_triton,
)

_Gradients = tuple[Tensor | None, ...]


class Plan(NamedTuple):
    """What a layer computes with beside tensors."""

    pairs: SortedPairs
    products: Products
    activate: Callable[[Tensor], Tensor]  # (S, H) to (S, F)


def hub_moe_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function registered in transformers' ExpertsInterface as `hub_moe`.

    Args:
        experts: A module of a class decorated with transformers' `use_experts_implementation`.
        hidden_states: (T, D).
        top_k_index: Integer (T, K).
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of `hidden_states`.

    Raises:
        UnsupportedModelError: For experts whose weights are not plain floating-point stacks, or that train parameters
            besides them.
        ConfigError: For an expert id out of range, or where what was asked for by HUB_MOE_CPU_EXPERTS or, on a GPU,
            HUB_MOE_GPU_EXPERTS cannot be had.
    """
    if hidden_states.device.type != "cpu" and uses_triton(experts, hidden_states.device):
        from .triton_forward import triton_experts_forward

        return triton_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        out: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
        return out
    stacks = stacks_of(experts)
    is_parallel = getattr(experts, "_is_expert_parallel", False)
    pairs = sort_pairs_by_expert(top_k_index, stacks.up.shape[0], may_be_elsewhere=is_parallel)
    products = choose_products(stacks.up.dtype)
    plan = Plan(pairs, products, experts._apply_gate if experts.has_gate else experts.act_fn)
    weight_S = top_k_weights.reshape(-1)
    if not has_post_expert_norm(experts):
        out_TD = _apply(_Experts, hidden_states, weight_S, plan, *stacks)
    else:
        y_SD = _apply(_Experts, hidden_states, None, plan, *stacks)
        y_SD = experts.post_expert_norm(y_SD.to(stacks.up.dtype))
        wide = torch.promote_types(stacks.up.dtype, torch.float32)
        weighted_SD = y_SD.to(wide) * weight_S[pairs.order_S].to(wide).unsqueeze(-1)
        out_TD = weighted_SD.new_zeros(hidden_states.shape).index_add(0, pairs.token_S, weighted_SD)
    return out_TD.to(hidden_states.dtype)


def liger_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function registered in transformers' ExpertsInterface as `hub_moe_liger`; arguments and result as above.

    liger-kernel's LigerFusedMoEFunction, https://github.com/linkedin/Liger-Kernel. The processor waits for the GPU once
    a layer, and the gradient of the weights is summed in no fixed order.

    Raises:
        MissingExtraError: Without liger-kernel.
        UnsupportedModelError: For experts that it does not know: others than silu(gate) * up without biases, weights
            of another dtype than the hidden states, or experts spread over processes.
    """
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise MissingExtraError(
            f'experts_implementation="{LIGER_IMPLEMENTATION}" needs liger-kernel: `pip install liger-kernel`.'
        ) from error
    why_not = _why_no_liger(experts, hidden_states)
    if why_not:
        raise UnsupportedModelError(
            f'experts_implementation="{LIGER_IMPLEMENTATION}" cannot compute {type(experts).__name__}: {why_not}; set '
            f'experts_implementation="{IMPLEMENTATION}" for it.'
        )
    expert_TK = top_k_index.to(torch.int32)
    return _apply(
        LigerFusedMoEFunction, hidden_states, experts.gate_up_proj, experts.down_proj, expert_TK, top_k_weights
    )


def _why_no_liger(experts: Any, hidden_states: Tensor) -> str | None:
    stacks = stacks_of(experts)
    if not is_swiglu(experts) or experts.has_bias or experts.is_transposed or has_post_expert_norm(experts):
        return "liger-kernel knows silu(gate) * up alone, without biases and norms, one row of a matrix per output"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    if {stacks.up.dtype, stacks.down.dtype} != {hidden_states.dtype}:
        return f"its weights are {stacks.up.dtype}, and the hidden states {hidden_states.dtype}"
    if hidden_states.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it lies on the CPU, and liger-kernel computes on GPUs"
    return None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, hub_moe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(LIGER_IMPLEMENTATION, liger_experts_forward)


def _apply(function: Any, *inputs: Any) -> Tensor:
    """`torch.autograd.Function.apply`, which torch leaves untyped."""
    output: Tensor = function.apply(*inputs)
    return output


class _Experts(torch.autograd.Function):
    """Tokens (T, D) to the weighted sum of their experts (T, D); without weights, to one row per pair (S, D)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_S: Tensor | None, plan: Plan, *stacks: Any) -> Tensor:
        up, down, up_bias, down_bias = Stacks(*stacks)
        pairs, products, activate = plan
        dtype = products.work_dtype(up.dtype)
        h_SH = products.multiply(x_TD.to(dtype).contiguous(), up, pairs.ends, pairs.token_S)
        if up_bias is not None:
            h_SH += _rows_of(up_bias, pairs)
        a_SF = activate(h_SH)
        y_SD = products.multiply(a_SF.to(dtype).contiguous(), down, pairs.ends)
        if down_bias is not None:
            y_SD += _rows_of(down_bias, pairs)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, h_SH, weight_S, *stacks)
        if weight_S is None:
            return y_SD
        wide = torch.promote_types(dtype, torch.float32)
        return sum_over_experts(y_SD.to(wide), weight_S[pairs.order_S].to(wide), pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> _Gradients:
        x_TD, h_SH, weight_S, *stacks = ctx.saved_tensors
        up, down, up_bias, down_bias = Stacks(*stacks)
        pairs, products, activate = ctx.plan
        need = dict(
            zip(("x", "weight", "plan", "up", "down", "up_bias", "down_bias"), ctx.needs_input_grad, strict=True)
        )
        dtype = products.work_dtype(up.dtype)
        # without weights each pair has its own row; with them all pairs of a token share the token's
        dout, rows_S = dout.to(dtype).contiguous(), None if weight_S is None else pairs.token_S
        scale_S1 = None if weight_S is None else weight_S[pairs.order_S].to(dtype).unsqueeze(-1)
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad():
            h_SH = h_SH.detach().requires_grad_()
            activated_SF = activate(h_SH)
        a_SF = activated_SF.detach().to(dtype)
        if need["down"]:
            scaled_SF = a_SF if scale_S1 is None else a_SF * scale_S1
            gradients["down"] = products.stack_gradient((scaled_SF, None), (dout, rows_S), pairs.ends, down)
        if need["down_bias"]:
            gradients["down_bias"] = _bias_gradient(_scaled(dout, rows_S, scale_S1), down_bias, pairs)
        if need["x"] or need["weight"] or need["up"] or need["up_bias"]:
            da_SF = products.multiply(dout, down.mT, pairs.ends, rows_S)
            if need["weight"]:
                gradients["weight"] = _weight_gradient((a_SF, da_SF), dout, (weight_S, down_bias), pairs)
            if scale_S1 is not None:
                da_SF *= scale_S1
            (dh_SH,) = torch.autograd.grad(activated_SF, h_SH, da_SF.to(activated_SF.dtype))
            if need["up"]:
                x = x_TD.to(dtype).contiguous()
                gradients["up"] = products.stack_gradient((x, pairs.token_S), (dh_SH, None), pairs.ends, up)
            if need["up_bias"]:
                gradients["up_bias"] = _bias_gradient(dh_SH, up_bias, pairs)
            if need["x"]:
                dx_SD = products.multiply(dh_SH, up.mT, pairs.ends)
                wide = torch.promote_types(dtype, torch.float32)
                gradients["x"] = sum_over_experts(dx_SD.to(wide), None, pairs).to(x_TD.dtype)
        return tuple(gradients.get(name) for name in need)


def _rows_of(bias_EB: Tensor, pairs: SortedPairs) -> Tensor:
    """Each pair's own bias, (S, B)."""
    return bias_EB.repeat_interleave(_counts(pairs), 0, output_size=pairs.ends[-1])


def _counts(pairs: SortedPairs) -> Tensor:
    return torch.tensor(pairs.ends).diff(prepend=torch.zeros(1, dtype=torch.int64))


def _scaled(rows: Tensor, places_S: Tensor | None, scale_S1: Tensor | None) -> Tensor:
    rows = rows if places_S is None else rows[places_S]
    return rows if scale_S1 is None else rows * scale_S1


def _bias_gradient(rows_SB: Tensor, like_EB: Tensor | None, pairs: SortedPairs) -> Tensor:
    assert like_EB is not None
    wide = torch.promote_types(rows_SB.dtype, torch.float32)
    expert_S = torch.repeat_interleave(torch.arange(len(pairs.ends)), _counts(pairs))
    gradient = torch.zeros(like_EB.shape, dtype=wide).index_add_(0, expert_S, rows_SB.to(wide))
    return gradient.to(like_EB.dtype)


def _weight_gradient(
    activations: tuple[Tensor, Tensor], dout_TD: Tensor, weights: tuple[Tensor, Tensor | None], pairs: SortedPairs
) -> Tensor:
    """y . dout of each pair, without y: (a @ down + bias) . dout = a . (dout @ down^T) + bias . dout."""
    (a_SF, da_SF), (weight_S, down_bias) = activations, weights
    wide = torch.promote_types(a_SF.dtype, torch.float32)
    sums_S = (a_SF * da_SF).sum(-1, dtype=wide)
    if down_bias is not None:
        sums_S += (_rows_of(down_bias, pairs) * dout_TD[pairs.token_S]).sum(-1, dtype=wide)
    gradient_S = torch.zeros(weight_S.shape, dtype=weight_S.dtype)
    gradient_S[pairs.order_S] = sums_S.to(weight_S.dtype)
    return gradient_S
