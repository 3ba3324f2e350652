"""The kernels of the experts on GPUs, and which block sizes each may take.

Every row product is one persistent grid: as many programs as the GPU holds at once walk over all tiles of all experts.
Which expert a tile belongs to is read from a map that the GPU made itself, so the processor never waits for it. Sums
run in float32 in a fixed order, and nothing is added to memory by atomics: the same inputs and block sizes give the
same bits.

Shape letters: T tokens, K experts per token, S = T * K token-expert pairs sorted by expert, E routed experts, F expert
inner, A what goes into a product, B what comes out, M rows and N columns of a tile, R the depth of one step.
"""

from functools import cache
from typing import Any

import triton
import triton.language as tl

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_Blocks = list[tuple[int, ...]]
ROWS_OF_TILE = (16, 64, 128)  # by bucket
MOST_PAIRS = (32, 128)  # an expert, on average, in all buckets but the last
# kernel -> by bucket: columns of a tile, depth of a step, warps, stages, programs on a multiprocessor. The first that
# fits is the one taken without measuring.
_FEW: _Blocks = [(64, 128, 4, 4, 2), (32, 256, 4, 3, 2), (128, 64, 4, 4, 2)]
_SOME: _Blocks = [(128, 64, 4, 4, 2), (256, 64, 4, 3, 1), (128, 64, 4, 3, 2), (64, 64, 4, 3, 2)]
_WIDE: _Blocks = [(256, 64, 8, 4, 1), (256, 64, 8, 3, 1), (128, 64, 4, 3, 2), (128, 64, 8, 4, 1), (64, 32, 4, 3, 2)]
# the gradient of silu(gate) * up needs registers, so its tiles are narrower
_SOME_NARROW: _Blocks = [(128, 64, 4, 4, 2), (128, 64, 4, 3, 2), (64, 64, 4, 3, 2)]
_NARROW: _Blocks = [(128, 64, 8, 4, 1), (128, 64, 8, 3, 1), (64, 64, 4, 3, 2), (64, 32, 4, 3, 2)]
_ROW_BLOCKS = (_FEW, _SOME, _WIDE)
_SQUARES: _Blocks = [
    (128, 128, 32, 4, 3, 2),
    (64, 128, 32, 4, 3, 2),
    (64, 64, 32, 4, 3, 2),
]  # rows of a tile come first
_LARGE_SQUARES: _Blocks = [(128, 256, 64, 8, 5, 1), (128, 128, 64, 4, 5, 2), (128, 256, 64, 8, 3, 1), *_SQUARES]
BLOCKS: dict[str, tuple[_Blocks, ...]] = {
    "multiply_rows": _ROW_BLOCKS,
    "multiply_rows_swiglu": _ROW_BLOCKS,
    "multiply_rows_swiglu_gradient": (_FEW, _SOME_NARROW, _NARROW),
    "stack_gradient": (_SQUARES, _SQUARES, _LARGE_SQUARES),
}


def bucket_of(pairs_per_expert: float) -> int:
    """The place in the tables above."""
    return sum(pairs_per_expert > most for most in MOST_PAIRS)


def configs_of(name: str, bucket: int, itemsize: int, shared_bytes: int) -> list[triton.Config]:
    """The configurations of a kernel whose stages fit into a multiprocessor's shared memory, the best guess first.

    Where none fits, the last.
    """
    blocks = BLOCKS[name][bucket]
    rows: tuple[int, ...] = () if name == "stack_gradient" else (ROWS_OF_TILE[bucket],)
    configs = []
    for each in blocks:
        block_m, block_n, block_r, warps, stages, programs = (*rows, *each)
        # places of gathered rows are read ahead of the rows, which takes every second stage of the gradient
        buffers = stages // 2 + 1 if name == "stack_gradient" else stages
        if (block_m + block_n) * block_r * itemsize * buffers * programs <= shared_bytes or each is blocks[-1]:
            meta = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": block_r, "PROGRAMS": programs}
            configs.append(triton.Config(meta, num_warps=warps, num_stages=stages))
    return configs


@cache
def tuned_kernel(name: str, bucket: int, itemsize: int, shared_bytes: int) -> Any:
    """The kernel with its configurations, of which triton times all at the first call for widths A and B.

    The choice is kept in triton's cache folder, so that later processes take the same.
    """
    configs = configs_of(name, bucket, itemsize, shared_bytes)
    return triton.autotune(configs, key=["A", "B"], cache_results=True)(KERNELS[name])


@triton.jit
def route(  # noqa: PLR0913 (a kernel gets pointers and sizes one by one)
    order_ptr, weight_ptr, ends_ptr, sorted_ptr,
    token_ptr, place_ptr, scale_ptr, tile_expert_ptr, tile_start_ptr, num_tiles_ptr, is_valid_ptr,
    S, E, TOP_K: tl.constexpr, MAY_BE_ELSEWHERE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The pairs' tokens, places and weights in the order of experts, and the map from tiles to experts.

    Grid: as many programs as there are experts or blocks of pairs, whichever are more.
    """
    program = tl.program_id(0)
    pairs = program * BLOCK_S + tl.arange(0, BLOCK_S)
    order = tl.load(order_ptr + pairs, mask=pairs < S, other=0)
    tl.store(token_ptr + pairs, (order // TOP_K).to(tl.int32), mask=pairs < S)
    tl.store(place_ptr + order, pairs, mask=pairs < S)
    tl.store(scale_ptr + pairs, tl.load(weight_ptr + order, mask=pairs < S, other=0).to(tl.float32), mask=pairs < S)
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(ends_ptr + experts, mask=experts < E, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    if program < E:
        start = tl.sum(tl.where(experts == program, starts, 0))
        count = tl.sum(tl.where(experts == program, tiles, 0))
        first = tl.sum(tl.where(experts < program, tiles, 0))
        for tile in range(0, count, BLOCK_S):
            each = tile + tl.arange(0, BLOCK_S)
            tl.store(tile_expert_ptr + first + each, tl.zeros_like(each) + program, mask=each < count)
            tl.store(tile_start_ptr + first + each, start + each * BLOCK_M, mask=each < count)
    if program == 0:
        tl.store(num_tiles_ptr, tl.sum(tiles))
        tl.store(is_valid_ptr, 1)
        if S > 0:
            is_valid = (tl.load(sorted_ptr) >= 0) & ((tl.load(sorted_ptr + S - 1) < E) | MAY_BE_ELSEWHERE)
            tl.store(is_valid_ptr, is_valid.to(tl.int32))


@triton.jit
def _add_product(left_MR, right_RN, sum_MN, PRECISION: tl.constexpr):
    if IS_INTERPRETED:  # its product takes the bits of a bfloat16 for an integer
        left_MR, right_RN = left_MR.to(tl.float32), right_RN.to(tl.float32)
    return tl.dot(left_MR, right_RN, sum_MN, input_precision=PRECISION)


@triton.jit
def _find_tile(tile_expert_ptr, tile_start_ptr, ends_ptr, tile, BLOCK_M: tl.constexpr):
    """The expert of a tile, its rows, and which of them are its own."""
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    row_M = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    return expert, row_M, row_M < tl.load(ends_ptr + expert)


@triton.jit
def _multiply_tile(  # noqa: PLR0913 (as above)
    x_ptr, source_M, stride_x, matrix_ptr, stride_a, stride_b, column_N, inside_N,
    depth, A: tl.constexpr, HAS_INSIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of x, wherever they lie, times some columns of a matrix: float32 (M, N). No copy of the rows is made.

    `depth` is A, but not a constant, for which the compiler would unroll the loop.
    """
    step_R = tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + source_M.to(tl.int64)[:, None] * stride_x + step_R[None, :]
    matrix_ptrs = matrix_ptr + step_R[:, None] * stride_a + column_N[None, :] * stride_b
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_R):
        if A % BLOCK_R == 0:
            x_MR = tl.load(x_ptrs)
            matrix_RN = tl.load(matrix_ptrs, mask=inside_N[None, :], other=0) if HAS_INSIDE else tl.load(matrix_ptrs)
        else:
            x_MR = tl.load(x_ptrs, mask=step_R[None, :] < depth - start, other=0)
            matrix_RN = tl.load(matrix_ptrs, mask=(step_R[:, None] < depth - start) & inside_N[None, :], other=0)
        sum_MN = _add_product(x_MR, matrix_RN, sum_MN, PRECISION)
        x_ptrs += BLOCK_R
        matrix_ptrs += BLOCK_R * stride_a
    return sum_MN


@triton.jit
def multiply_rows(  # noqa: PLR0913 (as above)
    x_ptr, rows_ptr, stack_ptr, bias_ptr, scale_ptr, out_ptr,
    tile_expert_ptr, tile_start_ptr, num_tiles_ptr, ends_ptr,
    stride_x, stride_e, stride_a, stride_b, depth,
    A: tl.constexpr, B: tl.constexpr,
    GATHERS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Each pair's row times its expert's matrix, plus its bias, times its weight: contiguous (S, B)."""
    num_columns = tl.cdiv(B, BLOCK_N)
    for each in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_columns, tl.num_programs(0)):
        expert, row_M, inside_M = _find_tile(
            tile_expert_ptr, tile_start_ptr, ends_ptr, each // num_columns, BLOCK_M
        )  # fmt: skip
        column_N = (each % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = column_N < B
        source_M = tl.load(rows_ptr + row_M, mask=inside_M, other=0) if GATHERS else tl.where(inside_M, row_M, 0)
        y_MN = _multiply_tile(
            x_ptr, source_M, stride_x, stack_ptr + expert * stride_e, stride_a, stride_b, column_N, inside_N,
            depth, A, B % BLOCK_N != 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            y_MN += tl.load(bias_ptr + expert * B + column_N, mask=inside_N, other=0)[None, :]
        if HAS_SCALE:
            y_MN *= tl.load(scale_ptr + row_M, mask=inside_M, other=0)[:, None]
        out_ptrs = out_ptr + row_M.to(tl.int64)[:, None] * B + column_N[None, :]
        tl.store(out_ptrs, y_MN.to(out_ptr.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


@triton.jit
def multiply_rows_swiglu(  # noqa: PLR0913 (as above)
    x_ptr, rows_ptr, stack_ptr, bias_ptr, h_ptr, out_ptr,
    tile_expert_ptr, tile_start_ptr, num_tiles_ptr, ends_ptr,
    stride_x, stride_e, stride_a, stride_b, depth,
    A: tl.constexpr, B: tl.constexpr,
    HAS_BIAS: tl.constexpr, KEEPS_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of each pair's row times its expert's matrix: (S, F), and if wanted what went into it, (S, B).

    B is 2F, the gate first. A tile takes turns between columns of the gate and of up, so that both halves of a product
    end in the same thread.
    """
    F: tl.constexpr = B // 2
    HALF_N: tl.constexpr = BLOCK_N // 2
    num_columns = tl.cdiv(F, HALF_N)
    for each in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_columns, tl.num_programs(0)):
        expert, row_M, inside_M = _find_tile(
            tile_expert_ptr, tile_start_ptr, ends_ptr, each // num_columns, BLOCK_M
        )  # fmt: skip
        first = (each % num_columns) * HALF_N
        place_N = tl.arange(0, BLOCK_N)
        column_N = (place_N % 2) * F + first + place_N // 2
        inside_N = first + place_N // 2 < F
        source_M = tl.load(rows_ptr + row_M, mask=inside_M, other=0)
        h_MN = _multiply_tile(
            x_ptr, source_M, stride_x, stack_ptr + expert * stride_e, stride_a, stride_b, column_N, inside_N,
            depth, A, F % HALF_N != 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if HAS_BIAS:
            h_MN += tl.load(bias_ptr + expert * B + column_N, mask=inside_N, other=0)[None, :]
        gate, up = tl.split(tl.reshape(h_MN, (BLOCK_M, HALF_N, 2)))
        column = first + tl.arange(0, HALF_N)
        inside = inside_M[:, None] & (column < F)[None, :]
        row_M = row_M.to(tl.int64)
        if KEEPS_H:
            h_ptrs = h_ptr + row_M[:, None] * B + column[None, :]
            tl.store(h_ptrs, gate.to(h_ptr.dtype.element_ty), mask=inside)
            tl.store(h_ptrs + F, up.to(h_ptr.dtype.element_ty), mask=inside)
        a = gate * tl.sigmoid(gate) * up
        tl.store(out_ptr + row_M[:, None] * F + column[None, :], a.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves(x_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right columns; each thread keeps what it has."""
    return tl.split(tl.permute(tl.reshape(x_MN, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _through_swiglu(  # noqa: PLR0913 (as above)
    da_MN, h_ptr, dh_ptr, scaled_ptr, row_M, inside_M, scale_M,
    first, B: tl.constexpr, KEEPS_SCALED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some columns' pre-activations; returns a . da over them, (M)."""
    column_N = first + tl.arange(0, WIDTH)
    inside = inside_M[:, None] & (column_N < B)[None, :]
    places = row_M[:, None] * (2 * B) + column_N[None, :]
    gate = tl.load(h_ptr + places, mask=inside, other=0).to(tl.float32)
    up = tl.load(h_ptr + places + B, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    part_M = tl.sum(tl.where(inside, silu * up * da_MN, 0), 1)
    if KEEPS_SCALED:
        scaled = (silu * up * scale_M[:, None]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + row_M[:, None] * B + column_N[None, :], scaled, mask=inside)
    da_MN *= scale_M[:, None]
    dgate = da_MN * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(dh_ptr + places, dgate.to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_ptr + places + B, (da_MN * silu).to(dh_ptr.dtype.element_ty), mask=inside)
    return part_M


@triton.jit
def multiply_rows_swiglu_gradient(  # noqa: PLR0913 (as above)
    dout_ptr, rows_ptr, stack_ptr, scale_ptr, h_ptr, dh_ptr, scaled_ptr, parts_ptr,
    tile_expert_ptr, tile_start_ptr, num_tiles_ptr, ends_ptr,
    stride_x, stride_e, stride_a, stride_b, depth, S,
    A: tl.constexpr, B: tl.constexpr, PART_N: tl.constexpr,
    KEEPS_SCALED: tl.constexpr, KEEPS_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the output to that of the pre-activations, (S, 2F); `stack` is the turned down matrices.

    On the way, where wanted: activations times weights (S, F), which the down matrices' gradient is made of, and each
    pair's part of the weights' gradient from each PART_N columns, (parts, S), in the first part of a tile.
    """
    PARTS: tl.constexpr = BLOCK_N // PART_N
    num_columns = tl.cdiv(B, BLOCK_N)
    for each in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_columns, tl.num_programs(0)):
        expert, row_M, inside_M = _find_tile(
            tile_expert_ptr, tile_start_ptr, ends_ptr, each // num_columns, BLOCK_M
        )  # fmt: skip
        column_N = (each % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_N = column_N < B
        da_MN = _multiply_tile(
            dout_ptr, tl.load(rows_ptr + row_M, mask=inside_M, other=0), stride_x,
            stack_ptr + expert * stride_e, stride_a, stride_b, column_N, inside_N,
            depth, A, B % BLOCK_N != 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        scale_M = tl.load(scale_ptr + row_M, mask=inside_M, other=0)
        row_M = row_M.to(tl.int64)
        part_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
        left, right = _halves(da_MN, BLOCK_M, BLOCK_N)  # a quarter at a time, for want of registers
        for side in tl.static_range(2):
            quarters = _halves(left if side == 0 else right, BLOCK_M, BLOCK_N // 2)
            for place in tl.static_range(2):
                first = (each % num_columns) * BLOCK_N + (2 * side + place) * (BLOCK_N // 4)
                part_M += _through_swiglu(
                    quarters[place], h_ptr, dh_ptr, scaled_ptr, row_M, inside_M, scale_M,
                    first, B, KEEPS_SCALED, BLOCK_N // 4,
                )  # fmt: skip
        if KEEPS_PARTS:
            part_P = tl.arange(0, PARTS)
            place_P = (each % num_columns) * PARTS + part_P
            parts_ptrs = parts_ptr + place_P.to(tl.int64)[None, :] * S + row_M[:, None]
            part_MP = tl.where(part_P[None, :] == 0, part_M[:, None], 0)
            tl.store(parts_ptrs, part_MP, mask=inside_M[:, None] & (place_P * PART_N < B)[None, :])


@triton.jit
def stack_gradient(  # noqa: PLR0913 (as above)
    left_ptr, left_rows_ptr, right_ptr, right_rows_ptr, out_ptr, ends_ptr,
    stride_left, stride_right, stride_e, stride_a, stride_b, E,
    A: tl.constexpr, B: tl.constexpr,
    GATHERS_LEFT: tl.constexpr, GATHERS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The sum over each expert's pairs of outer products left x right, (E, A, B); zeros for an expert without any."""
    num_columns = tl.cdiv(B, BLOCK_N)
    tiles = tl.cdiv(A, BLOCK_M) * num_columns
    for each in range(tl.program_id(0), E * tiles, tl.num_programs(0)):
        expert, tile = each // tiles, each % tiles
        a_M = (tile // num_columns) * BLOCK_M + tl.arange(0, BLOCK_M)
        b_N = (tile % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_M, inside_N = a_M < A, b_N < B
        first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(first, end, BLOCK_R):
            row_R = start + tl.arange(0, BLOCK_R)
            inside_R = row_R < end
            left_R = tl.load(left_rows_ptr + row_R, mask=inside_R, other=0) if GATHERS_LEFT else row_R
            right_R = tl.load(right_rows_ptr + row_R, mask=inside_R, other=0) if GATHERS_RIGHT else row_R
            left_ptrs = left_ptr + left_R.to(tl.int64)[None, :] * stride_left + a_M[:, None]
            right_ptrs = right_ptr + right_R.to(tl.int64)[:, None] * stride_right + b_N[None, :]
            left_MR = tl.load(left_ptrs, mask=inside_M[:, None] & inside_R[None, :], other=0)
            right_RN = tl.load(right_ptrs, mask=inside_R[:, None] & inside_N[None, :], other=0)
            sum_MN = _add_product(left_MR, right_RN, sum_MN, PRECISION)
        out_ptrs = out_ptr + expert.to(tl.int64) * stride_e + a_M[:, None] * stride_a + b_N[None, :] * stride_b
        tl.store(out_ptrs, sum_MN.to(out_ptr.dtype.element_ty), mask=inside_M[:, None] & inside_N[None, :])


@triton.jit
def sum_over_experts(
    y_ptr, place_ptr, ends_ptr, out_ptr, E, B: tl.constexpr, TOP_K: tl.constexpr, BLOCK_B: tl.constexpr
):  # fmt: skip
    """Each token's rows added up, always in the order of its choices: (T, B). Grid: tokens, blocks of columns."""
    token, column_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    num_rows = tl.load(ends_ptr + E - 1)
    sum_B = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + choice).to(tl.int64)
        width = tl.where(place < num_rows, B, 0)  # a pair of another process has no row
        sum_B += tl.load(y_ptr + place * B + column_B, mask=column_B < width, other=0).to(tl.float32)
    tl.store(out_ptr + token * B + column_B, sum_B.to(out_ptr.dtype.element_ty), mask=column_B < B)


@triton.jit
def sum_over_pairs(  # noqa: PLR0913 (as above)
    x_ptr, rows_ptr, scale_ptr, ends_ptr, out_ptr, stride_x,
    B: tl.constexpr, GATHERS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sum of the rows of each expert's pairs, times their weights: (E, B). Grid: experts, blocks of columns."""
    expert, column_B = tl.program_id(0), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    sum_B = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for start in range(first, end, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        inside_R = row_R < end
        source_R = tl.load(rows_ptr + row_R, mask=inside_R, other=0) if GATHERS else row_R
        x_ptrs = x_ptr + source_R.to(tl.int64)[:, None] * stride_x + column_B[None, :]
        x_RB = tl.load(x_ptrs, mask=inside_R[:, None] & (column_B < B)[None, :], other=0).to(tl.float32)
        if HAS_SCALE:
            x_RB *= tl.load(scale_ptr + row_R, mask=inside_R, other=0)[:, None]
        sum_B += tl.sum(x_RB, 0)
    tl.store(out_ptr + expert * B + column_B, sum_B.to(out_ptr.dtype.element_ty), mask=column_B < B)


KERNELS = {
    each.__name__: each for each in (multiply_rows, multiply_rows_swiglu, multiply_rows_swiglu_gradient, stack_gradient)
}
