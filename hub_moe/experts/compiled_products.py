"""The products of `Products` in compiled code, for float32 and bfloat16 weights.

`kernels/products.cpp` has a plain C interface. It is compiled on the user's machine at first use, as part of
`kernels/decoding.cpp`, which includes all files of the folder. That takes some seconds and goes into the user's cache
folder, under a name made from those files, the compiler and the processor's instruction sets. The code runs on as many
threads as torch is set to, in the OpenMP that torch has loaded, so the two share one set of threads. torch's
ATEN_CPU_CAPABILITY=avx2 holds it to AVX2, too.

Letters: S rows, E experts, A what goes into a product, B what comes out.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .bfloat16_speed import cache_folder, describe_processor
from .pairs import SortedPairs

_WHOLE_SOURCE = Path(__file__).parent / "kernels" / "decoding.cpp"  # includes the other files of its folder
_OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast")
_COMPILERS = ("g++", "c++", "clang++")
_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
_AVX512 = {*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
_LEVELS = {  # instruction set -> flags of /proc/cpuinfo, options of the compiler; the best first
    "avx512_bf16": ({*_AVX512, "avx512_bf16"}, ["-march=x86-64-v4", "-mavx512bf16"]),
    "avx512": (_AVX512, ["-march=x86-64-v4"]),
    "avx2": (_AVX2, ["-march=x86-64-v3"]),
}
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_MULTIPLY: list[Any] = [
    *(_POINTER, _INT, _LONG, _POINTER),
    *(_POINTER, _INT, _INT, _LONG, _LONG),
    *(_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT),
]
_GRADIENT: list[Any] = [
    *(_POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER),
    *(_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT, _INT),
]
_SWIGLU: list[Any] = [_POINTER, _LONG, _LONG, _POINTER, _INT, _INT]
_SWIGLU_GRADIENT: list[Any] = [*[_POINTER] * 3, _LONG, _LONG, *[_POINTER] * 3, _INT]
_ADD_UP: list[Any] = [*[_POINTER] * 3, *[_LONG] * 4, _POINTER, _INT]
_LEAST_BORROWED = 4 << 20  # bytes of a gradient; below that malloc keeps what it has
_MOST_WAITING = 1 << 30
DTYPES = (torch.float32, torch.bfloat16)


class CompiledProducts:
    """Calls into the compiled code; rows are float32 whatever the weights are. See `Products` for the arguments.

    Where the processor multiplies bfloat16 itself (AVX512_BF16), rows are rounded to it beside bfloat16 weights and for
    their gradients; sums stay float32.
    """

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.library = library
        self.name = f"compiled ({level})"
        self._takes_bfloat16_rows = bool(library.hub_moe_takes_bfloat16_rows())
        self._multiply, self._stack_gradient = library.hub_moe_multiply, library.hub_moe_stack_gradient
        self._multiply.argtypes, self._stack_gradient.argtypes = _MULTIPLY, _GRADIENT
        self._multiply.restype = self._stack_gradient.restype = None
        self._swiglu, self._swiglu_gradient = library.hub_moe_swiglu, library.hub_moe_swiglu_gradient
        self._add_up = library.hub_moe_add_up
        self._swiglu.argtypes, self._swiglu_gradient.argtypes = _SWIGLU, _SWIGLU_GRADIENT
        self._add_up.argtypes = _ADD_UP
        self._swiglu.restype = self._swiglu_gradient.restype = self._add_up.restype = None

    def work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Products`."""
        return torch.float32

    def multiply(
        self, x_SA: Tensor, stack_EAB: Tensor, ends: tuple[int, ...], rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Products`."""
        num_experts, width_in, width_out = stack_EAB.shape
        by_rows = stack_EAB.stride(1) == 1
        if not by_rows and stack_EAB.stride(2) != 1:
            stack_EAB = stack_EAB.contiguous()
        if self._wants_bfloat16_rows(stack_EAB):
            x_SA = x_SA.bfloat16()
        y_SB = _make_rows(ends[-1], width_out) if out is None else out
        x_address, *x_places = _place(x_SA, rows)
        self._multiply(
            x_address,
            x_SA.dtype == torch.bfloat16,
            *x_places,
            stack_EAB.data_ptr(),
            stack_EAB.dtype == torch.bfloat16,
            by_rows,
            stack_EAB.stride(0),
            stack_EAB.stride(2 if by_rows else 1),
            (_LONG * num_experts)(*ends),
            num_experts,
            width_in,
            width_out,
            y_SB.data_ptr(),
            torch.get_num_threads(),
        )
        return y_SB

    def stack_gradient(
        self, left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], ends: tuple[int, ...],
        like_EAB: Tensor,
    ) -> Tensor:  # fmt: skip
        """See `Products`."""
        is_turned = like_EAB.stride(1) == 1 and like_EAB.mT.is_contiguous()
        if is_turned:
            left, right, like_EAB = right, left, like_EAB.mT
        written = _MEMORY.borrow(like_EAB.shape, like_EAB.dtype)
        self._stack_gradient(
            *_place(*left),
            *_place(*right),
            (_LONG * len(ends))(*ends),
            *written.shape,
            written.data_ptr(),
            written.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return written.mT if is_turned else written

    def _wants_bfloat16_rows(self, stack_EAB: Tensor) -> bool:
        return self._takes_bfloat16_rows and stack_EAB.dtype == torch.bfloat16 and stack_EAB.stride(1) == 1

    def swiglu(self, h_SH: Tensor, stack_EAB: Tensor) -> Tensor:
        """silu(first half) * second half of each row, (S, F), in the dtype in which `stack` takes rows."""
        rows, width = h_SH.shape[0], h_SH.shape[1] // 2
        is_bfloat16 = self._wants_bfloat16_rows(stack_EAB)
        a_SF = _make_rows(rows, width, dtype=torch.bfloat16 if is_bfloat16 else torch.float32)
        self._swiglu(h_SH.data_ptr(), rows, width, a_SF.data_ptr(), is_bfloat16, torch.get_num_threads())
        return a_SF

    def swiglu_gradient(self, h_SH: Tensor, da_SF: Tensor, scale_S: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What backward needs of a = swiglu(h), given the gradient `da` of a * scale over scale; all float32.

        Returns:
            a * scale (S, F), the gradient of h (S, H), and a . da of each row (S,).
        """
        a_SF, dh_SH, sums_S = torch.empty_like(da_SF), torch.empty_like(h_SH), _make_rows(h_SH.shape[0])
        given = [None if each is None else each.data_ptr() for each in (h_SH, da_SF, scale_S)]
        made = [each.data_ptr() for each in (a_SF, dh_SH, sums_S)]
        self._swiglu_gradient(*given, *da_SF.shape, *made, torch.get_num_threads())
        return a_SF, dh_SH, sums_S

    def sum_over_experts(self, y_SD: Tensor, weight_TK: Tensor | None, pairs: SortedPairs) -> Tensor:
        """See `Products`."""
        out_TD = _make_rows(pairs.num_tokens, y_SD.shape[1])
        weight_TK = None if weight_TK is None else weight_TK.float().contiguous()
        given = [None if each is None else each.data_ptr() for each in (y_SD, weight_TK, pairs.order_S)]
        sizes = y_SD.shape[0], pairs.num_tokens, pairs.top_k, y_SD.shape[1]
        self._add_up(*given, *sizes, out_TD.data_ptr(), torch.get_num_threads())
        return out_TD


class GradientMemory:
    """Memory that gradients of stacks had, for the next ones: to get it from the system takes as long as to fill it.

    A gradient's memory comes back when the last tensor on it is gone, as after `zero_grad`. Until it is used again the
    system may take its pages (MADV_FREE), so what waits here is not missing elsewhere, although it counts as resident.
    """

    def __init__(self, most_bytes: int) -> None:
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._most_bytes = most_bytes

    @property
    def _waiting_bytes(self) -> int:
        """Added up each time: threads give memory back at once, and would lose some of each other's counting."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def borrow(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not initialised."""
        size = shape.numel() * dtype.itemsize
        if size < _LEAST_BORROWED or not hasattr(mmap, "MADV_FREE"):
            return _make_rows(*shape, dtype=dtype)
        block = _pop(self._free[size]) or _map_memory(size)
        return _lend(block, shape, dtype, self._take_back)

    def _take_back(self, block: mmap.mmap) -> None:
        if self._waiting_bytes + len(block) <= self._most_bytes:
            block.madvise(mmap.MADV_FREE)
            self._free[len(block)].append(block)


class SpareMemory:
    """The same for one kind of tensor whose size changes from step to step: one block waits, the largest so far.

    Of blocks as large as each of them was, as many would wait as there are sizes.
    """

    def __init__(self) -> None:
        self._spare: list[mmap.mmap] = []  # one, or more where threads give back at once; pop and append are atomic

    def borrow(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, not initialised."""
        size = shape.numel() * dtype.itemsize
        if size < _LEAST_BORROWED or not hasattr(mmap, "MADV_FREE"):
            return _make_rows(*shape, dtype=dtype)
        block = _pop(self._spare)
        if block is None or len(block) < size:
            block = _map_memory(size)
        return _lend(block, shape, dtype, self._take_back)

    def _take_back(self, block: mmap.mmap) -> None:
        block.madvise(mmap.MADV_FREE)
        other = _pop(self._spare)
        self._spare.append(block if other is None or len(other) < len(block) else other)


def _pop(blocks: list[mmap.mmap]) -> mmap.mmap | None:
    try:
        return blocks.pop()
    except IndexError:
        return None


def _map_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _lend(block: mmap.mmap, shape: torch.Size, dtype: torch.dtype, take_back: Callable[[mmap.mmap], None]) -> Tensor:
    """A tensor at the start of a block, which is taken back when the last tensor on it is gone."""
    lease = (ctypes.c_char * (shape.numel() * dtype.itemsize)).from_buffer(block)
    weakref.finalize(lease, take_back, block).atexit = False
    return torch.frombuffer(lease, dtype=dtype).view(shape)


_MEMORY = GradientMemory(_MOST_WAITING)


def _make_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Not initialised; compiled code writes to them, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _place(rows: Tensor, places: Tensor | None) -> tuple[int, int, int | None]:
    """Address, elements from one row to the next, and the address of the places."""
    assert rows.stride(1) == 1 or rows.shape[1] == 1
    assert places is None or places.is_contiguous()
    return rows.data_ptr(), rows.stride(0), None if places is None else places.data_ptr()


def load_compiled_products() -> CompiledProducts:
    """Those for the best instruction set that this processor has and torch is allowed to use.

    Raises:
        ConfigError: Where there is no compiler, it fails, or the processor is not one that the code is for.
    """
    return load_level(find_levels()[0])


@cache
def load_level(level: str) -> CompiledProducts:
    """Build for one instruction set of `find_levels`, unless the cache has it, and load.

    Raises:
        ConfigError: As `load_compiled_products`.
    """
    path = _build(_find_compiler(), level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(f"The compiled experts cannot be loaded: {error}.") from error
    if not library.hub_moe_is_supported():
        raise ConfigError(f"The compiled experts need a processor with {level}, which this one turned out to lack.")
    return CompiledProducts(library, level)


def find_levels() -> list[str]:
    """The instruction sets that the code can be compiled for here, the best first.

    Raises:
        ConfigError: Where there is none.
    """
    words = set(describe_processor().split())
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ConfigError(f"The compiled experts are for x86-64 processors, not for {platform.machine()}.")
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", "avx512")
    allowed = {"avx512": list(_LEVELS), "avx2": ["avx2"]}.get(wanted, [])
    levels = [name for name in allowed if _LEVELS[name][0] <= words]
    if not levels:
        raise ConfigError("The compiled experts need a processor with AVX2 and FMA, or AVX512.")
    return levels


def _find_compiler() -> list[str]:
    """The words of its command."""
    wanted = os.environ.get("CXX", "").strip()
    try:
        candidates = [shlex.split(wanted)] if wanted else [[name] for name in _COMPILERS]
    except ValueError as error:
        raise ConfigError(f"CXX is {wanted!r}, which is no command: {error}.") from error
    for words in candidates:
        if shutil.which(words[0]) is not None:
            return words
    missing = f"CXX names {candidates[0][0]}, which is no program here"
    if not wanted:
        missing = f"none of {', '.join(_COMPILERS)} was found"
    raise ConfigError(f"The compiled experts need a C++ compiler, and {missing}.")


def _build(compiler: list[str], level: str) -> Path:
    """The library's path; it appears there whole, whichever of several processes builds it first."""
    options = [*_OPTIONS, *_LEVELS[level][1]]
    sources = sorted(path for path in _WHOLE_SOURCE.parent.iterdir() if path.is_file())
    digest = hashlib.sha256("\n".join([*options, *compiler, describe_processor()]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    path = cache_folder() / f"experts-{level}-{digest.hexdigest()[:16]}.so"
    try:
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = Path(scratch) / path.name
            done = subprocess.run(
                [*compiler, *options, str(_WHOLE_SOURCE), "-o", str(built)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), f"exit {done.returncode}")
                raise ConfigError(f"The compiled experts could not be built by {shlex.join(compiler)}: {reason}")
            os.replace(built, path)
    except OSError as error:
        raise ConfigError(f"The compiled experts could not be built in {path.parent}: {error}.") from error
    return path
