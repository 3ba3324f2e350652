"""Experts on a GPU, forward and backward, by the kernels of `triton_kernels`.

Rows are gathered while the first product reads them; silu(gate) * up and its gradient are computed where a product
ends; the second product writes each pair's row, already times its weight, and one kernel adds up each token's. For
backward only the input, the pre-activations and the routing are kept. A frozen stack costs no gradient. The processor
never waits for the GPU.

Everything is repeatable bit by bit once block sizes are chosen. Those are timed at the first call of a size and kept
in triton's cache folder; with `torch.use_deterministic_algorithms(True)` the first of each list is taken instead, so
that timing has no part in a result.

Shape letters: T tokens, K experts per token, S = T * K token-expert pairs sorted by expert, D hidden, F expert inner,
H what the first product gives (2F with a gate), E routed experts, A what goes into a product, B what comes out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_kernels as kernels
from .stacks import Stacks, is_swiglu, stacks_of

_PROGRAMS_OF_INTERPRETER = 3  # few enough that each walks over several tiles
_Gradients = tuple[Tensor | None, ...]


class Routing(NamedTuple):
    """The pairs in the order in which they are computed. On the GPU, all of it; those of other processes come last."""

    token_S: Tensor  # int32, the token of each pair
    place_S: Tensor  # int32, where each of (T, K) went
    scale_S: Tensor  # float32, the weight of each pair
    ends_E: Tensor  # int32, where the pairs of each expert end
    tile_expert: Tensor  # int32, of each tile; there is room for as many as there can be
    tile_start: Tensor  # int32
    num_tiles: Tensor  # int32 (1)


class Plan(NamedTuple):
    """What a layer computes with beside tensors that have gradients."""

    expert_TK: Tensor
    activate: Callable[[Tensor], Tensor]  # (S, H) to (S, F)
    is_swiglu: bool  # then `activate` is silu of the first half times the second
    may_be_elsewhere: bool
    keeps_h: bool


def triton_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `hub_moe_experts_forward`, for modules that `stacks.why_not_triton_for` has nothing against.

    An expert id that no expert has stops the GPU by a device-side assertion, as torch's own indexing does.
    """
    stacks = stacks_of(experts)
    trained = (hidden_states, top_k_weights, *stacks)
    plan = Plan(
        top_k_index,
        activate=experts._apply_gate if experts.has_gate else experts.act_fn,
        is_swiglu=is_swiglu(experts),
        may_be_elsewhere=getattr(experts, "_is_expert_parallel", False),
        keeps_h=torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in trained),
    )
    apply: Any = _Experts.apply  # torch leaves it untyped
    with torch.cuda.device_of(hidden_states):
        output: Tensor = apply(hidden_states, top_k_weights, plan, *stacks)
    return output


def route(plan: Plan, weight_TK: Tensor, num_experts: int) -> Routing:
    """Sort the pairs and map tiles to experts, without waiting for the device."""
    key_S = plan.expert_TK.reshape(-1).to(torch.int32)
    num_pairs, device = key_S.shape[0], key_S.device
    sorted_S, order_S = torch.sort(key_S, stable=True)
    experts_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)
    block_m = kernels.ROWS_OF_TILE[_bucket(num_pairs, num_experts)]
    num_tiles = num_pairs // block_m + min(num_experts, num_pairs)
    lengths = (num_pairs, num_pairs, num_tiles, num_tiles, 1, 1)
    tokens, places, tile_expert, tile_start, count, is_valid = (
        torch.empty(length, dtype=torch.int32, device=device) for length in lengths
    )
    scale_S = torch.empty(num_pairs, dtype=torch.float32, device=device)
    kernels.route[(max(num_experts, _ceil(num_pairs, 1024)),)](
        *(order_S, weight_TK.reshape(-1), ends_E, sorted_S),
        *(tokens, places, scale_S, tile_expert, tile_start, count, is_valid),
        S=num_pairs,
        E=num_experts,
        TOP_K=plan.expert_TK.shape[-1],
        MAY_BE_ELSEWHERE=plan.may_be_elsewhere,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_S=1024,
    )
    torch._assert_async(is_valid, f"The router chose an expert id that none of the {num_experts} experts has.")
    return Routing(tokens, places, scale_S, ends_E, tile_expert, tile_start, count)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, plan: Plan, *stacks: Any) -> Tensor:
        up, down, up_bias, down_bias = Stacks(*stacks)
        routing = route(plan, weight_TK, up.shape[0])
        work_TD = _rows(x_TD.to(up.dtype))
        if _is_fused(plan, up):
            h_SH, a_SF = _multiply_swiglu(work_TD, up, up_bias, routing, keeps_h=plan.keeps_h)
        else:
            h_SH = _multiply(work_TD, up, routing, gathers=True, bias_EB=up_bias)
            a_SF = plan.activate(h_SH).to(up.dtype).contiguous()
        y_SD = _multiply(a_SF, down, routing, bias_EB=down_bias, is_scaled=True)
        ctx.plan, ctx.x_dtype, ctx.weight_dtype = plan, x_TD.dtype, weight_TK.dtype
        ctx.save_for_backward(work_TD, h_SH, *routing, *stacks)
        return _sum_over_experts(y_SD, plan.expert_TK.shape[-1], routing, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> _Gradients:
        with torch.cuda.device_of(dout_TD):
            return _Backward(ctx, dout_TD).gradients()


class _Backward:
    """One backward pass; a class because its steps share what was saved and which gradients are wanted."""

    def __init__(self, ctx: Any, dout_TD: Tensor) -> None:
        fields = len(Routing._fields)
        self.x_TD, self.h_SH, *rest = ctx.saved_tensors
        self.routing, self.stacks = Routing(*rest[:fields]), Stacks(*rest[fields:])
        self.plan, self.dtypes = ctx.plan, (ctx.x_dtype, ctx.weight_dtype)
        self.dout_TD = _rows(dout_TD.to(self.stacks.up.dtype))
        names = ("x", "weight", "plan", *Stacks._fields)
        self.need = dict(zip(names, ctx.needs_input_grad, strict=True))

    def gradients(self) -> _Gradients:
        need, routing, (up, down, up_bias, down_bias) = self.need, self.routing, self.stacks
        found: dict[str, Tensor] = {}
        dh_SH, scaled_SF, sums_S = self._through_activation()
        if need["down"]:
            assert scaled_SF is not None
            found["down"] = _stack_gradient((scaled_SF, False), (self.dout_TD, True), down, routing)
        if need["down_bias"]:
            found["down_bias"] = _sum_over_pairs(self.dout_TD, down_bias, routing, is_gathered=True)
        if need["weight"]:
            found["weight"] = self._weight_gradient(sums_S).to(self.dtypes[1])
        if dh_SH is None:
            return tuple(found.get(name) for name in need)
        if need["up"]:
            found["up"] = _stack_gradient((self.x_TD, True), (dh_SH, False), up, routing)
        if need["up_bias"]:
            found["up_bias"] = _sum_over_pairs(dh_SH, up_bias, routing, is_gathered=False)
        if need["x"]:
            dx_SD = _multiply(dh_SH, up.mT, routing)
            found["x"] = _sum_over_experts(dx_SD, self.plan.expert_TK.shape[-1], routing, self.dtypes[0])
        return tuple(found.get(name) for name in need)

    def _through_activation(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradient of the pre-activations, activations times weights, and a . da of each pair, where wanted."""
        need, routing, down = self.need, self.routing, self.stacks.down
        needs_dh = need["x"] or need["up"] or need["up_bias"]
        if (needs_dh or need["weight"]) and _is_fused(self.plan, self.stacks.up):
            return _multiply_swiglu_gradient(
                self.dout_TD, self.h_SH, down.mT, routing, keeps_scaled=need["down"], keeps_parts=need["weight"]
            )
        with torch.enable_grad():
            h_SH = self.h_SH.detach().requires_grad_()
            activated_SF = self.plan.activate(h_SH)
        a_SF, scale_S1 = activated_SF.detach(), routing.scale_S.unsqueeze(-1)
        scaled_SF = (a_SF * scale_S1).to(down.dtype).contiguous() if need["down"] else None
        if not needs_dh and not need["weight"]:
            return None, scaled_SF, None
        da_SF = _multiply(self.dout_TD, down.mT, routing, gathers=True)
        sums_S = (a_SF * da_SF).sum(-1, dtype=torch.float32) if need["weight"] else None
        if not needs_dh:
            return None, scaled_SF, sums_S
        (dh_SH,) = torch.autograd.grad(activated_SF, h_SH, (da_SF * scale_S1).to(activated_SF.dtype))
        return dh_SH.contiguous(), scaled_SF, sums_S

    def _weight_gradient(self, sums_S: Tensor | None) -> Tensor:
        """y . dout of each pair, without y: (a @ down + bias) . dout = a . (dout @ down^T) + bias . dout."""
        assert sums_S is not None
        expert_TK, place_S = self.plan.expert_TK, self.routing.place_S
        gradient_TK = sums_S[place_S].view(expert_TK.shape)
        bias_ED = self.stacks.down_bias
        if bias_ED is not None:
            of_all_TE = self.dout_TD.float() @ bias_ED.float().mT
            gradient_TK += of_all_TE.gather(1, expert_TK.clamp(max=bias_ED.shape[0] - 1))
        is_here_TK = (place_S < self.routing.ends_E[-1]).view(expert_TK.shape)
        return torch.where(is_here_TK, gradient_TK, 0)


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _is_fused(plan: Plan, up: Tensor) -> bool:
    """A fused tile reads columns of gate and up in turns, which is slow where they lie beside each other in memory."""
    return plan.is_swiglu and up.stride(1) == 1


def _rows(x_TA: Tensor) -> Tensor:
    return x_TA if x_TA.stride(1) == 1 or x_TA.shape[1] == 1 else x_TA.contiguous()


def _bucket(num_pairs: int, num_experts: int) -> int:
    return kernels.bucket_of(num_pairs / num_experts)


def _launch(name: str, most_tiles: Callable[[int, int], int], routing: Routing, *inputs: Any, **settings: Any) -> None:
    """Start a persistent grid, no larger than the tiles that there can be.

    Args:
        most_tiles: From the rows and columns of a tile.
    """
    device = inputs[0].device
    bucket = _bucket(routing.token_S.shape[0], routing.ends_E.shape[0])
    is_interpreted = device.type == "cpu"
    if is_interpreted:
        multiprocessors, shared_bytes = _PROGRAMS_OF_INTERPRETER, 2**20
    else:
        properties: Any = torch.cuda.get_device_properties(device)
        multiprocessors = properties.multi_processor_count
        shared_bytes = properties.shared_memory_per_block_optin
    size = (name, bucket, inputs[0].element_size(), shared_bytes)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (min(multiprocessors * meta["PROGRAMS"], most_tiles(meta["BLOCK_M"], meta["BLOCK_N"])),)

    settings["PRECISION"] = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    if is_interpreted or torch.are_deterministic_algorithms_enabled():
        config = kernels.configs_of(*size)[0].all_kwargs()
        kernels.KERNELS[name][grid](*inputs, **settings, **config)
    else:
        kernels.tuned_kernel(*size)[grid](*inputs, **settings)


def _row_tiles(routing: Routing, width: int) -> Callable[[int, int], int]:
    return lambda block_m, block_n: routing.tile_expert.shape[0] * _ceil(width, block_n)


def _map(routing: Routing) -> tuple[Tensor, ...]:
    return routing.tile_expert, routing.tile_start, routing.num_tiles, routing.ends_E


def _multiply(
    x: Tensor, stack_EAB: Tensor, routing: Routing, *,
    gathers: bool = False, bias_EB: Tensor | None = None, is_scaled: bool = False,
) -> Tensor:  # fmt: skip
    """Each pair's row times its expert's matrix, (S, B); with `gathers` x is (T, A), otherwise (S, A)."""
    _, width_in, width_out = stack_EAB.shape
    y_SB = x.new_empty(routing.token_S.shape[0], width_out)
    bias = None if bias_EB is None else bias_EB.contiguous()
    _launch(
        *("multiply_rows", _row_tiles(routing, width_out), routing),
        *(x, routing.token_S, stack_EAB, bias, routing.scale_S, y_SB, *_map(routing)),
        *(x.stride(0), *stack_EAB.stride(), width_in),
        A=width_in,
        B=width_out,
        GATHERS=gathers,
        HAS_BIAS=bias is not None,
        HAS_SCALE=is_scaled,
    )
    return y_SB


def _multiply_swiglu(
    x_TD: Tensor, up_EDH: Tensor, bias_EH: Tensor | None, routing: Routing, *, keeps_h: bool
) -> tuple[Tensor | None, Tensor]:
    """Pre-activations (S, 2F), if they are to be kept, and activations (S, F)."""
    _, hidden, width = up_EDH.shape
    a_SF = x_TD.new_empty(routing.token_S.shape[0], width // 2)
    h_SH = x_TD.new_empty(a_SF.shape[0], width) if keeps_h else None
    bias = None if bias_EH is None else bias_EH.contiguous()
    _launch(
        *("multiply_rows_swiglu", _row_tiles(routing, width), routing),
        *(x_TD, routing.token_S, up_EDH, bias, h_SH, a_SF, *_map(routing)),
        *(x_TD.stride(0), *up_EDH.stride(), hidden),
        A=hidden,
        B=width,
        HAS_BIAS=bias is not None,
        KEEPS_H=keeps_h,
    )
    return h_SH, a_SF


def _multiply_swiglu_gradient(
    dout_TD: Tensor, h_SH: Tensor, turned_EDF: Tensor, routing: Routing, *, keeps_scaled: bool, keeps_parts: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See the kernel of this name; the last is the sum of its parts, (S,)."""
    _, hidden, inner = turned_EDF.shape
    num_pairs, bucket = h_SH.shape[0], _bucket(h_SH.shape[0], turned_EDF.shape[0])
    dh_SH = torch.empty_like(h_SH)
    scaled_SF = h_SH.new_empty(num_pairs, inner) if keeps_scaled else None
    narrowest = min(columns for columns, *_ in kernels.BLOCKS["multiply_rows_swiglu_gradient"][bucket])
    parts = None
    if keeps_parts:
        parts = h_SH.new_empty(_ceil(inner, narrowest), num_pairs, dtype=torch.float32)
    _launch(
        *("multiply_rows_swiglu_gradient", _row_tiles(routing, inner), routing),
        *(dout_TD, routing.token_S, turned_EDF, routing.scale_S, h_SH, dh_SH, scaled_SF, parts, *_map(routing)),
        *(dout_TD.stride(0), *turned_EDF.stride(), hidden, num_pairs),
        A=hidden,
        B=inner,
        PART_N=narrowest,
        KEEPS_SCALED=keeps_scaled,
        KEEPS_PARTS=keeps_parts,
    )
    return dh_SH, scaled_SF, None if parts is None else parts.sum(0)


def _stack_gradient(
    left: tuple[Tensor, bool], right: tuple[Tensor, bool], like_EAB: Tensor, routing: Routing
) -> Tensor:  # fmt: skip
    """The sum over each expert's pairs of outer products left x right, laid out and typed as `like`.

    Args:
        left: Rows of width A and whether they are tokens, (T, A), and not pairs, (S, A).
        right: The same of width B.
    """
    gradient_EAB = torch.empty_like(like_EAB)
    written = gradient_EAB
    if written.stride(2) != 1 and written.stride(1) == 1:
        left, right, written = right, left, gradient_EAB.mT
    num_experts, rows, columns = written.shape

    def most_tiles(block_m: int, block_n: int) -> int:
        return num_experts * _ceil(rows, block_m) * _ceil(columns, block_n)

    _launch(
        *("stack_gradient", most_tiles, routing),
        *(left[0], routing.token_S, right[0], routing.token_S, written, routing.ends_E),
        *(left[0].stride(0), right[0].stride(0), *written.stride(), num_experts),
        A=rows,
        B=columns,
        GATHERS_LEFT=left[1],
        GATHERS_RIGHT=right[1],
    )
    return gradient_EAB


def _sum_over_experts(y_SD: Tensor, top_k: int, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Each token's rows added up, (T, D)."""
    num_tokens, width = y_SD.shape[0] // top_k, y_SD.shape[1]
    out_TD = y_SD.new_empty(num_tokens, width, dtype=dtype)
    block = min(triton.next_power_of_2(width), 1024)
    kernels.sum_over_experts[(num_tokens, _ceil(width, block))](
        *(y_SD, routing.place_S, routing.ends_E, out_TD, routing.ends_E.shape[0]), B=width, TOP_K=top_k, BLOCK_B=block
    )
    return out_TD


def _sum_over_pairs(x: Tensor, like_EB: Tensor | None, routing: Routing, *, is_gathered: bool) -> Tensor:
    """The gradient of a bias: each expert's rows added up; those of tokens are gathered and times their weights."""
    assert like_EB is not None
    num_experts, width = like_EB.shape
    gradient_EB = torch.empty(like_EB.shape, dtype=like_EB.dtype, device=x.device)
    kernels.sum_over_pairs[(num_experts, _ceil(width, 64))](
        *(x, routing.token_S, routing.scale_S, routing.ends_E, gradient_EB, x.stride(0)),
        B=width,
        GATHERS=is_gathered,
        HAS_SCALE=is_gathered,
        BLOCK_R=64,
        BLOCK_B=64,
    )
    return gradient_EB
