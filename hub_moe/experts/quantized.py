"""Routed experts in 8 or 4 bits: weight-only, quantised by torchao while they load, one at a time.

Each use writes an expert's values, in the model's dtype, into one of a few slots that all layers share; the products
are those of a model whose weights are these values. So memory is saved, and not time. Products with the quantised
weights themselves, which torch has for some dtypes and layouts on the CPU, are not used: in bfloat16 that of int8 with
one token would save time, in float32 they take longer than this.

What is kept is what torchao's primitives compute: for int8, one symmetric step for each row of a matrix, which is at
most 2 / 255 of the row's largest number; for int4, one step for each group of up to 128 numbers of a row, which is at
most 1 / 15 of the range from the smallest to the largest of them and zero, and the level that stands for zero. A weight
is off by half a step at most. Biases are kept as they are.

Shape letters: E routed experts, N rows and K columns of an expert's matrix, G groups of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import ConfigError, MissingExtraError, UnsupportedModelError
from .expert_cache import ExpertCache, ExpertsInFiles, Key
from .offload import PlacedLayer, Placing

try:
    from torchao.quantization import quant_primitives as torchao
except ImportError as error:
    raise MissingExtraError("expert_dtype needs torchao: pip install 'hub_moe[quantized]'.") from error

logger = logging.get_logger(__name__)

DTYPES = ("int8", "int4")
_GROUPS = (128, 64, 32, 16, 8)
_FEWEST_SLOTS = 8
_SMALLEST_STEP = 1e-12


class PlainExperts:
    """A stack that stays in floats, such as biases, (E, ...)."""

    def __init__(self, stack: ExpertsInFiles, empty: Tensor) -> None:
        self.tensors = [empty]
        for expert, target in enumerate(empty):
            stack.fill_expert(expert, target)

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """Write one expert's values into `target`."""
        target.copy_(self.tensors[0][expert])


class Int8Experts:
    """A stack of matrices as int8 (E, N, K) and a float32 step for each row, (E, N, 1)."""

    def __init__(self, stack: ExpertsInFiles, shape: tuple[int, int, int], device: torch.device) -> None:
        self._value_ENK = torch.empty(shape, dtype=torch.int8, device=device)
        self._step_EN1 = torch.empty(*shape[:2], 1, dtype=torch.float32, device=device)
        self.tensors = [self._value_ENK, self._step_EN1]
        matrix_NK, block = torch.empty(shape[1:], dtype=torch.float32), (1, shape[2])
        for expert in range(shape[0]):
            stack.fill_expert(expert, matrix_NK)
            step, zero = torchao.choose_qparams_affine(
                matrix_NK, torchao.MappingType.SYMMETRIC, block, torch.int8, eps=_SMALLEST_STEP, keepdim=True
            )
            self._value_ENK[expert] = torchao.quantize_affine(matrix_NK, block, step, zero, torch.int8)
            self._step_EN1[expert] = step

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """As torchao's `dequantize_affine`, which takes many times as long."""
        torch.mul(self._value_ENK[expert], self._step_EN1[expert], out=target)


class Int4Experts:
    """A stack of matrices as levels 0 to 15, two in a byte (E, N, K / 2), with a step and a zero level for each group.

    The high bits are those of the left half of a row.

    Raises:
        UnsupportedModelError: If half a row is no multiple of 8.
    """

    def __init__(self, stack: ExpertsInFiles, shape: tuple[int, int, int], device: torch.device) -> None:
        num_experts, num_rows, width = shape
        group = next((size for size in _GROUPS if width % (2 * size) == 0), None)
        if group is None:
            raise UnsupportedModelError(
                f"expert_dtype='int4' is for matrices whose rows are multiples of {2 * _GROUPS[-1]} numbers, and these "
                f"experts have rows of {width}; use 'int8'."
            )
        self._group = group
        self._levels = torch.empty(num_experts, num_rows, width // 2, dtype=torch.uint8, device=device)
        self._step_ENG1 = torch.empty(num_experts, num_rows, width // group, 1, dtype=torch.float32, device=device)
        self._zero_ENG1 = torch.empty_like(self._step_ENG1, dtype=torch.int8)
        self.tensors = [self._levels, self._step_ENG1, self._zero_ENG1]
        matrix_NK = torch.empty(num_rows, width, dtype=torch.float32)
        for expert in range(num_experts):
            stack.fill_expert(expert, matrix_NK)
            self._put(expert, matrix_NK)

    def _put(self, expert: int, matrix_NK: Tensor) -> None:
        block, bounds = (1, self._group), {"quant_min": 0, "quant_max": 15}
        step, zero = torchao.choose_qparams_affine(
            matrix_NK, torchao.MappingType.ASYMMETRIC, block, torch.uint8, **bounds, eps=_SMALLEST_STEP
        )
        level_NK = torchao.quantize_affine(matrix_NK, block, step, zero, torch.uint8, **bounds)
        left, right = level_NK.chunk(2, dim=1)
        self._levels[expert] = left << 4 | right
        self._step_ENG1[expert], self._zero_ENG1[expert] = step.unsqueeze(-1), zero.unsqueeze(-1)

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """As torchao's `dequantize_affine`, which takes many times as long."""
        levels = self._levels[expert]
        halves = zip(
            (levels >> 4, levels & 15),
            target.chunk(2, dim=1),
            self._step_ENG1[expert].chunk(2, dim=1),
            self._zero_ENG1[expert].chunk(2, dim=1),
            strict=True,
        )
        for level, values, step, zero in halves:
            groups = values.unflatten(1, (-1, self._group))
            torch.sub(level.unflatten(1, (-1, self._group)), zero, out=groups)
            groups.mul_(step)


class Dequantizer:
    """Fills slots with the values of quantised experts."""

    reads_ahead = False

    def __init__(self, experts: Mapping[int, Mapping[str, Any]]) -> None:
        self.experts = experts

    def announce(self, key: Key) -> None:
        """Nothing goes on meanwhile."""

    def fill(self, places: Sequence[tuple[Key, Mapping[str, Tensor]]]) -> None:
        """Fill a slot for each expert."""
        with torch.no_grad():
            for (layer, expert), target in places:
                for name, stack in self.experts[layer].items():
                    stack.fill_expert(expert, target[name])


class Quantizing(Placing):
    """For an `expert_dtype`: the experts are kept in that.

    Raises:
        ConfigError: If there is no such dtype.
    """

    option, state, verb = "expert_dtype", "are quantised", "be read from the checkpoint's files"

    def __init__(self, dtype: str) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ConfigError(f"expert_dtype is {dtype!r}; 'int8' or 'int4' was expected.")
        self._dtype = dtype

    def _is_needed(self, layers: Sequence[PlacedLayer]) -> bool:
        return True

    def _make_caches(self, layers: Sequence[PlacedLayer]) -> list[ExpertCache]:
        with torch.no_grad():
            experts = {layer.found.index: self._quantize(layer) for layer in layers}
        num_slots = max(layers[0].found.top_k, _FEWEST_SLOTS)
        cache = ExpertCache(
            layers[0].shapes, num_slots, Dequantizer(experts), device=self._device, num_layers=len(layers)
        )
        kept = sum(each.nbytes for stacks in experts.values() for stack in stacks.values() for each in stack.tensors)
        logger.info(f"The routed experts take {kept:,} bytes as {self._dtype}.")
        return [cache]

    def _quantize(self, layer: PlacedLayer) -> dict[str, Any]:
        kind = Int8Experts if self._dtype == "int8" else Int4Experts
        quantized: dict[str, Any] = {}
        for name, stack in layer.files.items():
            shape, dtype = layer.shapes[name]
            if len(shape) == 2:
                quantized[name] = kind(stack, (layer.found.num_experts, *shape), self._device)
            else:
                empty = torch.empty(layer.found.num_experts, *shape, dtype=dtype, device=self._device)
                quantized[name] = PlainExperts(stack, empty)
        return quantized
