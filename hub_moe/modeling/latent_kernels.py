"""Flash decoding over the latent cache on a GPU: the kernels behind `absorbed_attention.attend_to_latents`.

The cached tokens are split among programs. Each reads its latents and rotary keys once, for all heads and new tokens
of a sequence together (up to 64 rows of queries), and keeps scores, weights and the sum of latents on the chip; a
second kernel joins the splits (flash decoding, https://pytorch.org/blog/flash-decoding). Sums run in float32 in a fixed
order, and how many splits there are follows from shapes and the kind of GPU alone: the same inputs give the same bits.
The processor never waits for the GPU. Without gradients.

Shape letters: as in `absorbed_attention`; M = H * L rows of queries, of which a program has BLOCK_M, N splits.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MissingExtraError

try:  # what transformers sees imported outside of a `try`, a checkpoint with this code could not be loaded without
    import triton
    import triton.language as tl
except ImportError as error:
    raise MissingExtraError("The kernels for the latent cache need triton; `pip install triton`.") from error

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2_E = tl.constexpr(1.4426950408889634)
_MOST_ROWS = 64
_BLOCKS_TO_START = 2  # a program takes as long to start and to end as it takes to read this many blocks
_SLOTS_OF_INTERPRETER = 7
_JOINED_SPLITS, _JOINED_COLUMNS = 16, 128
_MOST_LATENT, _MOST_ROPE = 512, 128


class Blocks(NamedTuple):
    """How one program works: cached tokens read at once, warps, and stages, of which all but one lie in memory."""

    tokens: int
    warps: int
    stages: int


# By rows of queries, the best guess first; the first that has room on a multiprocessor is taken. Of the first of 16
# rows Hopper runs two at once, which hide each other's waits; with 8 warps registers leave room for one.
BLOCKS = {
    16: (Blocks(32, 4, 3), Blocks(64, 4, 3), Blocks(64, 4, 2), Blocks(32, 4, 5), Blocks(32, 4, 2), Blocks(16, 4, 2)),
    32: (Blocks(64, 8, 3), Blocks(32, 8, 5), Blocks(32, 8, 3), Blocks(32, 8, 2)),
    64: (Blocks(32, 8, 3), Blocks(64, 8, 2), Blocks(32, 8, 2)),
}
# float32 is multiplied as three products of what the matrix units take, and needs registers for all
WIDE_BLOCKS = {16: (Blocks(16, 4, 3), Blocks(16, 4, 2))}
_MOST_WARPS_BESIDE_ANOTHER = 4


@triton.jit
def _product(left_MA, right_AN, sum_MN, PRECISION: tl.constexpr):
    if IS_INTERPRETED:  # its product takes the bits of a bfloat16 for an integer
        left_MA, right_AN = left_MA.to(tl.float32), right_AN.to(tl.float32)
    return tl.dot(left_MA, right_AN, sum_MN, input_precision=PRECISION)


@triton.jit
def _load_rows(pointers, inside, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (rows, BLOCK), zero where they are not inside or behind their WIDTH."""
    if BLOCK == WIDTH:
        return tl.load(pointers + column[None, :], mask=inside[:, None], other=0)
    return tl.load(pointers + column[None, :], mask=inside[:, None] & (column < WIDTH)[None, :], other=0)


@triton.jit(do_not_specialize=["S", "tokens_of_split", "mask_b", "mask_h", "mask_l"])
def attend_to_split(  # noqa: PLR0913 (a kernel gets pointers and sizes one by one)
    query_ptr, turned_ptr, latent_ptr, rope_ptr, mask_ptr, sum_ptr, state_ptr,
    query_b, query_h, query_l, turned_b, turned_h, turned_l, latent_b, latent_s, rope_b, rope_s, mask_b, mask_h, mask_l,
    S, tokens_of_split, H, L, scale,
    C: tl.constexpr, R: tl.constexpr, MASK: tl.constexpr, IS_WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Sums of latents (N, H, B, L, C) over some tokens, and of their largest scores and weights' sums (N, H, B, L, 2).

    Scores are base-2 logarithms: `scale` is log2(e) times that of the natural ones. IS_WHOLE says that there is one
    split, whose sums are divided here. Grid: splits, blocks of rows, sequences.
    """
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head_M, new_M, is_row_M = (row_M // L).to(tl.int64), (row_M % L).to(tl.int64), row_M < H * L
    column_C, column_R = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    query_ptrs = query_ptr + batch * query_b + (head_M * query_h + new_M * query_l)[:, None]
    query_MC = _load_rows(query_ptrs, is_row_M, column_C, C, BLOCK_C)
    turned_ptrs = turned_ptr + batch * turned_b + (head_M * turned_h + new_M * turned_l)[:, None]
    query_MR = _load_rows(turned_ptrs, is_row_M, column_R, R, BLOCK_R)
    first = split.to(tl.int64) * tokens_of_split
    count = tl.minimum(tokens_of_split, S - first).to(tl.int32)
    latent_ptr += batch * latent_b + first * latent_s
    rope_ptr += batch * rope_b + first * rope_s
    if MASK != "none":
        mask_ptrs = mask_ptr + batch * mask_b + first + (head_M * mask_h + new_M * mask_l)[:, None]
    highest_M = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    weight_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sum_MC = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for start in range(0, count, BLOCK_S):
        token_S = start + tl.arange(0, BLOCK_S)
        inside_S = token_S < count
        inside_MS = is_row_M[:, None] & inside_S[None, :]
        if MASK != "none":  # asked for first, so that it is there when the scores are
            mask_MS = tl.load(mask_ptrs + token_S[None, :], mask=inside_MS, other=0)
        latent_SC = _load_rows(latent_ptr + token_S[:, None] * latent_s, inside_S, column_C, C, BLOCK_C)
        rope_SR = _load_rows(rope_ptr + token_S[:, None] * rope_s, inside_S, column_R, R, BLOCK_R)
        score_MS = tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32)
        score_MS = _product(query_MC, tl.trans(latent_SC), score_MS, PRECISION)
        score_MS = _product(query_MR, tl.trans(rope_SR), score_MS, PRECISION) * scale
        if MASK == "numbers":  # -inf in a whole row would make it NaN
            score_MS = tl.maximum(score_MS + mask_MS.to(tl.float32) * LOG2_E, LOWEST)
        if MASK == "bool":
            inside_MS = inside_MS & mask_MS
        score_MS = tl.where(inside_MS, score_MS, float("-inf"))
        newest_M = tl.maximum(highest_M, tl.max(score_MS, 1))
        weight_MS = tl.exp2(score_MS - newest_M[:, None])
        shrink_M = tl.exp2(highest_M - newest_M)
        weight_M = weight_M * shrink_M + tl.sum(weight_MS, 1)
        weight_MS = weight_MS.to(latent_SC.dtype)
        sum_MC = _product(weight_MS, latent_SC, sum_MC * shrink_M[:, None], PRECISION)
        highest_M = newest_M
    place_M = ((split * H + head_M) * tl.num_programs(2) + batch) * L + new_M
    if IS_WHOLE:
        sum_MC /= tl.where(weight_M > 0, weight_M, 1)[:, None]  # a row that sees nothing has sum 0
    else:
        tl.store(state_ptr + place_M * 2, highest_M, mask=is_row_M)
        tl.store(state_ptr + place_M * 2 + 1, weight_M, mask=is_row_M)
    is_stored = is_row_M[:, None] & (column_C < C)[None, :]
    tl.store(sum_ptr + place_M[:, None] * C + column_C[None, :], sum_MC.to(sum_ptr.dtype.element_ty), mask=is_stored)


@triton.jit(do_not_specialize=["N"])
def join_splits(
    sum_ptr, state_ptr, out_ptr, rows, N, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Weighted means of latents (rows, C), 0 for a row that sees nothing. Grid: rows, blocks of columns."""
    row, column_C = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    split_N = tl.arange(0, BLOCK_N)
    highest_N = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        place_N = (first + split_N).to(tl.int64) * rows + row
        highest_N = tl.maximum(highest_N, tl.load(state_ptr + place_N * 2, mask=first + split_N < N, other=LOWEST))
    highest = tl.max(highest_N, 0)
    weight_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_C = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        inside_N = first + split_N < N
        place_N = (first + split_N).to(tl.int64) * rows + row
        share_N = tl.exp2(tl.load(state_ptr + place_N * 2, mask=inside_N, other=LOWEST) - highest)
        weight_N += share_N * tl.load(state_ptr + place_N * 2 + 1, mask=inside_N, other=0)
        inside_NC = inside_N[:, None] & (column_C < C)[None, :]
        sum_NC = tl.load(sum_ptr + place_N[:, None] * C + column_C[None, :], mask=inside_NC, other=0)
        sum_C += tl.sum(share_N[:, None] * sum_NC, 0)
    weight = tl.sum(weight_N, 0)
    mean_C = sum_C / tl.where(weight > 0, weight, 1)
    tl.store(out_ptr + row * C + column_C, mean_C.to(out_ptr.dtype.element_ty), mask=column_C < C)


KERNELS = {each.__name__: each for each in (attend_to_split, join_splits)}


def attend_in_splits(
    query_BHLC: Tensor,
    turned_BHLR: Tensor,
    cache: tuple[Tensor, Tensor],
    *,
    mask: Tensor | None,
    scaling: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """Softmax-weighted means of latents, (B, H, L, C) in the dtype of the queries; 0 where a query sees nothing.

    Args:
        query_BHLC: What is multiplied with latents: float32, bfloat16 or float16, on the device of all the rest.
        turned_BHLR: The rotated parts of the queries, multiplied with rotary keys.
        cache: Latents (B, S, C) and rotary keys (B, S, R), of which C and R must be what `fits` says.
        mask: Bool with True for what is seen, or numbers to add, broadcastable to (B, H, L, S).
        scaling: Factor of the scores.
        blocks: How programs work, instead of the choice from shapes and the kind of GPU.
    """
    latent_BSC, rope_BSR = (each if each.stride(2) == 1 else each.contiguous() for each in cache)
    query_BHLC, turned_BHLR = (each if each.stride(3) == 1 else each.contiguous() for each in (query_BHLC, turned_BHLR))
    (batch, heads, new, width), cached = query_BHLC.shape, latent_BSC.shape[1]
    if mask is not None:
        mask = mask.expand(batch, heads, new, cached)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    block_m, blocks, slots = _choose_blocks(heads * new, (latent_BSC, rope_BSR), blocks)
    programs = batch * -(-heads * new // block_m)
    tokens_of_split = blocks.tokens * choose_split(programs, -(-cached // blocks.tokens), slots)
    splits = -(-cached // tokens_of_split)
    dtype = query_BHLC.dtype if splits == 1 else torch.float32
    sum_NHBLC = query_BHLC.new_empty(splits, heads, batch, new, width, dtype=dtype)
    state_NHBL2 = query_BHLC.new_empty(splits, heads, batch, new, 2, dtype=torch.float32)
    with torch.cuda.device_of(latent_BSC):
        KERNELS["attend_to_split"][splits, programs // batch, batch](
            *(query_BHLC, turned_BHLR, latent_BSC, rope_BSR, mask, sum_NHBLC, state_NHBL2),
            *(*query_BHLC.stride()[:3], *turned_BHLR.stride()[:3], *latent_BSC.stride()[:2], *rope_BSR.stride()[:2]),
            *(mask.stride()[:3] if mask is not None else (0, 0, 0)),
            *(cached, tokens_of_split, heads, new, scaling * LOG2_E.value),
            C=width,
            R=rope_BSR.shape[2],
            MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "numbers",
            IS_WHOLE=splits == 1,
            PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3",
            BLOCK_M=block_m,
            BLOCK_S=blocks.tokens,
            BLOCK_C=_padded(width),
            BLOCK_R=_padded(rope_BSR.shape[2]),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if splits == 1:
            return sum_NHBLC[0].transpose(0, 1)
        return _join(sum_NHBLC, state_NHBL2, query_BHLC.dtype).transpose(0, 1)


def _join(sum_NHBLC: Tensor, state_NHBL2: Tensor, dtype: torch.dtype) -> Tensor:
    out_HBLC = torch.empty_like(sum_NHBLC[0], dtype=dtype)
    splits, *sizes, width = sum_NHBLC.shape
    rows = math.prod(sizes)
    KERNELS["join_splits"][rows, -(-width // _JOINED_COLUMNS)](
        *(sum_NHBLC, state_NHBL2, out_HBLC, rows, splits), C=width, BLOCK_N=_JOINED_SPLITS, BLOCK_C=_JOINED_COLUMNS
    )
    return out_HBLC


def fits(latent_size: int, rope_size: int) -> bool:
    """Whether sums and queries of these widths have room on a multiprocessor."""
    return 0 < latent_size <= _MOST_LATENT and 0 < rope_size <= _MOST_ROPE


def choose_split(programs: int, blocks: int, slots: int) -> int:
    """How many of a sequence's blocks one split has, so that all are read soonest.

    Args:
        programs: Sequences times blocks of rows.
        blocks: Of cached tokens, of each sequence.
        slots: Programs that the GPU runs at once.
    """

    def cost(most: int) -> int:
        splits = -(-blocks // most)
        return -(-programs * splits // slots) * (most + _BLOCKS_TO_START)

    waves = (max(1, wave * slots // programs) for wave in range(1, 5))
    return min((-(-blocks // min(blocks, splits)) for splits in waves), key=cost)


def _padded(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _choose_blocks(rows: int, cache: tuple[Tensor, Tensor], given: Blocks | None) -> tuple[int, Blocks, int]:
    """Rows of a program, how it works, and how many of them the GPU runs at once."""
    device, itemsize = cache[0].device, cache[0].element_size()
    row_bytes = sum(each.shape[2] for each in cache) * itemsize
    table = BLOCKS if itemsize < 4 else WIDE_BLOCKS
    block_m = min(max(table), max(16, int(triton.next_power_of_2(rows))))
    if device.type == "cpu":
        return block_m, given or table[block_m][0], _SLOTS_OF_INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    most, of_all = properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor
    choices = [(block_m, given)] if given else [(m, each) for m in table if m <= block_m for each in table[m]]
    choices.sort(key=lambda choice: -choice[0])  # the order among those of as many rows stays
    fitting = (choice for choice in choices if shared_bytes(*choice, row_bytes) <= most)
    block_m, blocks = next(fitting, choices[-1])
    beside = of_all // (shared_bytes(block_m, blocks, row_bytes) + 1024)
    programs = min(2, max(1, beside)) if blocks.warps <= _MOST_WARPS_BESIDE_ANOTHER else 1
    return block_m, blocks, properties.multi_processor_count * programs


def shared_bytes(block_m: int, blocks: Blocks, row_bytes: int) -> int:
    """The most shared memory that a program takes: queries, stages and what the products exchange."""
    stages = blocks.stages - 1 if block_m < _MOST_ROWS else blocks.stages
    return (block_m + stages * blocks.tokens) * row_bytes + max(4096, block_m * blocks.tokens * 2)
