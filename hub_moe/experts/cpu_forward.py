"""Experts on the CPU, forward and backward, for every family that uses transformers' ExpertsInterface.

Importing this registers `experts_implementation="hub_moe"`, which on a GPU stands for the kernels of `triton_forward`,
where those can be had, and otherwise, and while torch compiles, for transformers' own `grouped_mm`; see `stacks`.

Pairs are sorted once; each expert's matrix is read once per product; sums run in float32 (float64 for float64 weights)
and are rounded once, at the end. For backward only the input, the pre-activations and the routing are kept. A stack's
gradient is written once, whole; a frozen stack costs none.

Shape letters: T tokens, K experts per token, S token-expert pairs, D hidden, F expert inner, H what the first product
gives (2F with a gate), E routed experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..errors import ConfigError
from .compiled_products import CompiledProducts
from .decoding import INTERFACES, Routed, find_steps
from .pairs import SortedPairs, sort_pairs_by_expert
from .products import Products, SplitProducts, SplitStack, choose_products
from .stacks import IMPLEMENTATION, Stacks, has_post_expert_norm, is_swiglu, stacks_of, uses_triton

_Gradients = tuple[Tensor | None, ...]
_FEW_TOKENS = 4  # that share one pass over a weight
_TRAINED = ("x", "weight", "plan", "up", "down", "up_bias", "down_bias")  # inputs of _Experts that may need a gradient


class Plan(NamedTuple):
    """What a layer computes with beside tensors."""

    pairs: SortedPairs
    first_trained: int  # the pairs before it are those of frozen experts of a split layer
    products: Products
    activate: Callable[[Tensor], Tensor]  # (S, H) to (S, F)
    # from h (S, H), da (S, F) and a factor of each row (S,) to a * factor, dh, and a . da of each row
    differentiate: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]


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
        ConfigError: For an expert id out of range, for inputs of shapes or devices that do not fit, or where what was
            asked for by HUB_MOE_CPU_EXPERTS or, on a GPU, HUB_MOE_GPU_EXPERTS cannot be had.
    """
    if hidden_states.device.type != "cpu" and uses_triton(experts, hidden_states.device):
        from .triton_forward import triton_experts_forward

        return triton_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        out: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
        return out
    stacks = stacks_of(experts)
    _check_inputs(hidden_states, (top_k_index, top_k_weights), stacks)
    fed_TD = _feed_few(experts, hidden_states, (top_k_index, top_k_weights), stacks)
    if fed_TD is not None:
        return fed_TD
    is_parallel = getattr(experts, "_is_expert_parallel", False)
    pairs = sort_pairs_by_expert(top_k_index, stacks.up.shape[0], may_be_elsewhere=is_parallel)
    plan = _plan(experts, pairs, choose_products(stacks.up.dtype), stacks.down)
    return _compute(experts, hidden_states, top_k_weights, plan, stacks)


def _check_inputs(x_TD: Tensor, routing: tuple[Tensor, Tensor], stacks: Stacks) -> None:
    """Compiled code takes addresses and sizes on trust."""
    expert_TK, weight_TK = routing
    places = {str(each.device) for each in (x_TD, *routing, *stacks) if each is not None}
    if len(places) > 1:
        raise ConfigError(f"Experts, tokens, ids and weights have to be on one device, not on {sorted(places)}.")
    width, shapes = stacks.up.shape[1], [tuple(each.shape) for each in (x_TD, *routing)]
    if expert_TK.dim() != 2 or shapes != [(expert_TK.shape[0], width), expert_TK.shape, expert_TK.shape]:
        raise ConfigError(
            f"Experts of width {width} take tokens (T, {width}) and, for each, K ids and K weights, "
            f"not tensors of shapes {shapes}."
        )


def _feed_few(experts: Any, x_TD: Tensor, routing: tuple[Tensor, Tensor], stacks: Stacks) -> Tensor | None:
    """The same for a few tokens without gradients in one compiled call; None where that cannot compute it.

    One token's experts take little more than reading their weights, to which sorting pairs and four calls add a tenth.
    So few rows of one expert are the same sums in the products, and come out as the same bits.
    """
    expert_TK, weight_TK = routing
    up_EHD, down_EDF = stacks.up.mT, stacks.down.mT
    num_experts, width, inner = down_EDF.shape
    if len(x_TD) > _FEW_TOKENS or not x_TD.dtype == up_EHD.dtype == down_EDF.dtype:
        return None
    if up_EHD.shape != (num_experts, 2 * inner, width):
        return None
    is_plain = up_EHD.is_contiguous() and down_EDF.is_contiguous() and stacks.up_bias is None is stacks.down_bias
    if not is_plain or not is_swiglu(experts) or has_post_expert_norm(experts):
        return None
    steps = find_steps(x_TD, INTERFACES[-1])
    return (
        None if steps is None else steps.feed_forward(x_TD, None, Routed(up_EHD, down_EDF, expert_TK.long(), weight_TK))
    )


def split_experts_on_cpu(
    experts: Any, frozen: Any, chosen: Any, expert_ids: Sequence[int],
    inputs: tuple[Tensor, Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The same bits as `hub_moe_experts_forward` for a layer of which some experts are trained and no other is.

    Args:
        experts: As there.
        frozen: Four stacks of its E experts, as in `Stacks`.
        chosen: Four stacks of the trained ones, of the same dtype, whose rows in `frozen` are not used.
        expert_ids: Which experts those are.
        inputs: Hidden states, experts of each token and their weights, as there.

    Raises:
        ConfigError: For an expert id out of range.
    """
    hidden_states, top_k_index, top_k_weights = inputs
    _check_inputs(hidden_states, inputs[1:], Stacks(*frozen))
    num_experts, products = frozen.up.shape[0], choose_products(frozen.up.dtype)
    pairs = sort_pairs_by_expert(top_k_index, num_experts, chosen=expert_ids)
    plan = _plan(experts, pairs, products, frozen.down)
    plan = plan._replace(first_trained=pairs.ends[num_experts - 1], products=SplitProducts(products))
    return _compute(experts, hidden_states, top_k_weights, plan, (*chosen, *frozen))


def _compute(experts: Any, x_TD: Tensor, weight_TK: Tensor, plan: Plan, stacks: Sequence[Tensor | None]) -> Tensor:
    pairs, weight_S, dtype = plan.pairs, weight_TK.reshape(-1), next(each.dtype for each in stacks if each is not None)
    if not has_post_expert_norm(experts):
        out_TD = _apply(_Experts, x_TD, weight_S, plan, *stacks)
        return out_TD.to(x_TD.dtype)
    y_SD = experts.post_expert_norm(_apply(_Experts, x_TD, None, plan, *stacks).to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    weighted_SD: Tensor = y_SD.to(wide) * weight_S[pairs.order_S].to(wide).unsqueeze(-1)
    return weighted_SD.new_zeros(x_TD.shape).index_add(0, pairs.token_S, weighted_SD).to(x_TD.dtype)


def _plan(experts: Any, pairs: SortedPairs, products: Products, down: Tensor) -> Plan:
    if isinstance(products, CompiledProducts) and is_swiglu(experts):
        return Plan(pairs, 0, products, partial(products.swiglu, stack_EAB=down), products.swiglu_gradient)
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    return Plan(pairs, 0, products, lambda h_SH: activate(h_SH).to(h_SH.dtype), partial(_differentiate, activate))


def _differentiate(
    activate: Callable[[Tensor], Tensor], h_SH: Tensor, da_SF: Tensor, scale_S: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Plan.differentiate` of any activation, by autograd."""
    with torch.enable_grad():
        h_SH = h_SH.detach().requires_grad_()
        activated_SF = activate(h_SH)
    a_SF = activated_SF.detach().to(da_SF.dtype)
    sums_S = (a_SF * da_SF).sum(-1, dtype=torch.promote_types(a_SF.dtype, torch.float32))
    if scale_S is not None:
        a_SF, da_SF = a_SF * scale_S.unsqueeze(-1), da_SF * scale_S.unsqueeze(-1)
    (dh_SH,) = torch.autograd.grad(activated_SF, h_SH, da_SF.to(activated_SF.dtype))
    return a_SF, dh_SH, sums_S


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, hub_moe_experts_forward)


def _apply(function: Any, *inputs: Any) -> Tensor:
    """`torch.autograd.Function.apply`, which torch leaves untyped."""
    output: Tensor = function.apply(*inputs)
    return output


class _Experts(torch.autograd.Function):
    """Tokens (T, D) to the weighted sum of their experts (T, D); without weights, to one row per pair (S, D).

    The stacks are four, or those four of the experts that are trained and then those of a layer that is split.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_S: Tensor | None, plan: Plan, *stacks: Any) -> Tensor:
        up, down, up_bias, down_bias = _group(stacks)
        pairs, products = plan.pairs, plan.products
        dtype = products.work_dtype(up.dtype)
        h_SH = products.multiply(x_TD.to(dtype).contiguous(), up, pairs.ends, pairs.token_S)
        if up_bias is not None:
            h_SH += _rows_of(up_bias, pairs)
        ctx.plan, ctx.x_dtype, h_kept = plan, x_TD.dtype, h_SH
        if plan.first_trained and not any(ctx.needs_input_grad[:2]):  # then no other pair matters in backward
            ctx.plan, h_kept = plan._replace(pairs=pairs.behind(plan.first_trained)), h_SH[plan.first_trained :].clone()
        x_kept = _keep_input(x_TD, plan) if ctx.needs_input_grad[_TRAINED.index("up")] else None
        ctx.save_for_backward(x_kept, h_kept, weight_S, *stacks)
        a_SF = plan.activate(h_SH)
        y_SD = products.multiply(a_SF.contiguous(), down, pairs.ends)
        if down_bias is not None:
            y_SD += _rows_of(down_bias, pairs)
        if weight_S is None:
            return y_SD
        return products.sum_over_experts(y_SD, weight_S, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> _Gradients:
        x_kept, h_SH, weight_S, *stacks = ctx.saved_tensors
        up, down, _, down_bias = _group(stacks)
        plan: Plan = ctx.plan
        pairs, products = plan.pairs, plan.products
        need = dict(zip(_TRAINED, ctx.needs_input_grad, strict=False))  # frozen stacks need none
        dtype = products.work_dtype(up.dtype)
        # without weights each pair has its own row; with them all pairs of a token share the token's
        dout, rows_S = dout.to(dtype).contiguous(), None if weight_S is None else pairs.token_S
        if weight_S is None:
            dout = dout[dout.shape[0] - h_SH.shape[0] :]  # which are all, or those of chosen experts
        scale_S = None if weight_S is None else weight_S[pairs.order_S].to(dtype)
        gradients: dict[str, Tensor] = {}
        if need["down_bias"]:
            gradients["down_bias"] = _bias_gradient(_scaled(dout, rows_S, scale_S), stacks[3], pairs)
        if not (need["x"] or need["weight"] or need["up"] or need["up_bias"]):
            if need["down"]:
                scaled_SF = _scaled(plan.activate(h_SH).to(dtype), None, scale_S)
                gradients["down"] = products.stack_gradient((scaled_SF, None), (dout, rows_S), pairs.ends, down)
            return _in_order(gradients, ctx)
        da_SF = products.multiply(dout, down.mT, pairs.ends, rows_S)
        scaled_SF, dh_SH, sums_S = plan.differentiate(h_SH, da_SF, scale_S)
        if need["weight"]:
            gradients["weight"] = _weight_gradient(sums_S, dout, (weight_S, down_bias), pairs)
        if need["down"]:
            gradients["down"] = products.stack_gradient((scaled_SF, None), (dout, rows_S), pairs.ends, down)
        if need["up"]:
            x = x_kept.to(dtype).contiguous(), _rows_of_kept(x_kept, pairs)
            gradients["up"] = products.stack_gradient(x, (dh_SH, None), pairs.ends, up)
        if need["up_bias"]:
            gradients["up_bias"] = _bias_gradient(dh_SH, stacks[2], pairs)
        if need["x"]:
            dx_SD = products.multiply(dh_SH, up.mT, pairs.ends)
            gradients["x"] = products.sum_over_experts(dx_SD, None, pairs).to(ctx.x_dtype)
        return _in_order(gradients, ctx)


def _keep_input(x_TD: Tensor, plan: Plan) -> Tensor:
    """All tokens, or what chosen experts saw of them where that is less."""
    token_S = plan.pairs.token_S[plan.first_trained :]
    return x_TD[token_S] if plan.first_trained and token_S.shape[0] < x_TD.shape[0] else x_TD


def _rows_of_kept(x_kept: Tensor, pairs: SortedPairs) -> Tensor:
    """Which row of `_keep_input` each pair is; nonsense for frozen experts, if it has no row of theirs."""
    num_pairs, num_kept = pairs.token_S.shape[0], x_kept.shape[0]
    return pairs.token_S if num_kept == pairs.num_tokens else torch.arange(num_kept - num_pairs, num_kept)


def _in_order(gradients: dict[str, Tensor], ctx: Any) -> _Gradients:
    """Those of the inputs of `_Experts`; None for frozen stacks and whatever needs none."""
    return tuple(gradients.get(name) for name in (*_TRAINED, *[""] * (len(ctx.needs_input_grad) - len(_TRAINED))))


def _group(stacks: Sequence[Any]) -> Any:
    """Four, as in `Stacks`; of a split layer `SplitStack`s, and biases of E + C experts."""
    if len(stacks) == len(Stacks._fields):
        return stacks
    chosen, frozen = Stacks(*stacks[:4]), Stacks(*stacks[4:])
    up_bias, down_bias = (
        None if whole is None or part is None else torch.cat((whole, part))
        for whole, part in ((frozen.up_bias, chosen.up_bias), (frozen.down_bias, chosen.down_bias))
    )
    return SplitStack(frozen.up, chosen.up), SplitStack(frozen.down, chosen.down), up_bias, down_bias


def _rows_of(bias_EB: Tensor, pairs: SortedPairs) -> Tensor:
    """Each pair's own bias, (S, B)."""
    return bias_EB.repeat_interleave(_counts(pairs), 0, output_size=pairs.ends[-1])


def _counts(pairs: SortedPairs) -> Tensor:
    return torch.tensor(pairs.ends).diff(prepend=torch.zeros(1, dtype=torch.int64))


def _scaled(rows: Tensor, places_S: Tensor | None, scale_S: Tensor | None) -> Tensor:
    rows = rows if places_S is None else rows[places_S]
    return rows if scale_S is None else rows * scale_S.unsqueeze(-1)


def _bias_gradient(rows_SB: Tensor, like_CB: Tensor, pairs: SortedPairs) -> Tensor:
    """Of the last C experts."""
    wide = torch.promote_types(rows_SB.dtype, torch.float32)
    expert_S = torch.repeat_interleave(torch.arange(len(pairs.ends)), _counts(pairs))
    gradient_EB = torch.zeros(len(pairs.ends), like_CB.shape[1], dtype=wide).index_add_(0, expert_S, rows_SB.to(wide))
    return gradient_EB[-like_CB.shape[0] :].to(like_CB.dtype)


def _weight_gradient(
    sums_S: Tensor, dout_TD: Tensor, weights: tuple[Tensor, Tensor | None], pairs: SortedPairs
) -> Tensor:
    """y . dout of each pair, without y: (a @ down + bias) . dout = a . (dout @ down^T) + bias . dout."""
    weight_S, down_bias = weights
    if down_bias is not None:
        sums_S += (_rows_of(down_bias, pairs) * dout_TD[pairs.token_S]).sum(-1, dtype=sums_S.dtype)
    gradient_S = torch.zeros(weight_S.shape, dtype=weight_S.dtype)
    gradient_S[pairs.order_S] = sums_S.to(weight_S.dtype)
    return gradient_S
