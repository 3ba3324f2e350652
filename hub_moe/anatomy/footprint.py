"""What a Mixture-of-Experts model costs: parameters, operations, cache and memory, from its config alone."""

import copy
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..errors import UnsupportedModelError
from .moe_layers import MoeLayer, find_moe_layers
from .parameters import KINDS, SortedParameter, sort_parameters
from .rehearsal import Rehearsal, rehearse

# What a weight format covers, as published checkpoints do it: projections of attention, MLP and experts. Embeddings,
# head, router, norms and biases stay in bf16.
_QUANTISED_KINDS = {"attention", "dense_mlp", "shared_experts", "routed_experts"}
_BLOCK = 128


@dataclass(frozen=True)
class Footprint:
    """A model's parts and what they cost. Sizes are in bytes, of one sequence, the cache in bf16."""

    model_type: str
    class_name: str
    num_layers: int
    max_context: int | None
    moe_layers: tuple[MoeLayer, ...]
    parameters: tuple[SortedParameter, ...]
    rehearsal: Rehearsal

    @property
    def num_parameters(self) -> int:
        """All parameters of the model without its MTP layers, which is what publishers count."""
        return sum(p.size for p in self.parameters if p.kind != "mtp")

    @property
    def num_active(self) -> int:
        """Parameters one token passes through: K routed experts and everything else but the input embedding.

        DeepSeek and OpenAI count like this (V3: 37 B).
        """
        return sum(p.active_size for p in self.parameters)

    @property
    def num_active_with_embeddings(self) -> int:
        """`num_active` and the whole input embedding, as Qwen, OLMoE and Mixtral count (Qwen3-30B-A3B: 3.3 B)."""
        is_tied = any(p.kind == "head" and not p.size for p in self.parameters)
        embeddings = sum(p.size for p in self.parameters if p.kind == "embeddings")
        return self.num_active + (0 if is_tied else embeddings)

    @property
    def num_per_expert(self) -> int:
        """Parameters of one routed expert in one layer."""
        first = self.moe_layers[0]
        return sum(parameter.numel() for parameter in first.experts.parameters()) // first.num_experts

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """`(all, active)` parameters of every kind that the model has, in the order of `KINDS`."""
        sizes: Counter[str] = Counter()
        active: Counter[str] = Counter()
        for parameter in self.parameters:
            sizes[parameter.kind] += parameter.size
            active[parameter.kind] += parameter.active_size
        return {kind: (sizes[kind], active[kind]) for kind in KINDS if sizes[kind] or active[kind]}

    def forward_flops(self, context: int) -> int:
        """Operations for one token whose attention meets `context` tokens: 2 x active weights + attention.

        Both terms count a multiply-add as two; a causal mask is not discounted (arXiv:2204.02311 appendix B). Norms,
        activations, routing and the recurrence of linear attention are left out.
        """
        return 2 * self.num_active_weights + self.attention_flops(context)

    def attention_flops(self, context: int) -> int:
        """The part of `forward_flops` that grows with the context: queries x keys, and weights x values."""
        return sum(call.flops(context) for call in self.rehearsal.attention)

    def training_flops(self, context: int) -> int:
        """Operations for one token of training: backward costs twice forward (arXiv:2001.08361 section 2.1)."""
        return 3 * self.forward_flops(context)

    @property
    def num_active_weights(self) -> int:
        """Active parameters that multiply a vector: matrices, not norms and biases."""
        return sum(p.active_size for p in self.parameters if p.is_matrix)

    def cache_bytes(self, context: int) -> int:
        """What transformers' cache holds after `context` tokens."""
        return sum(layer.size_bytes(context) for layer in self.rehearsal.cache)

    def weight_bytes(self) -> dict[str, int]:
        """Size of the weights, MTP layers included, in three formats.

        fp8 has a float32 scale for each 128 x 128 block, as DeepSeek-V3 ships; int4 a bf16 scale for each 128 weights
        of a row and no zero points. Both cover the projections of attention, MLP and experts, the rest being bf16.
        """
        covered = [p for p in self.parameters if p.is_matrix and p.kind_in_layer in _QUANTISED_KINDS]
        rest_bytes = 2 * (sum(p.size for p in self.parameters) - sum(p.size for p in covered))
        return {
            "bf16": rest_bytes + sum(2 * p.size for p in covered),
            "fp8": rest_bytes + sum(p.size + _fp8_scale_bytes(p.shape) for p in covered),
            "int4": rest_bytes + sum(p.size // 2 + _int4_scale_bytes(p.shape) for p in covered),
        }

    def context_that_fits(self, memory_bytes: int, weight_bytes: int) -> int | None:
        """Tokens of one sequence whose cache fits beside the weights, up to the model's limit; None if none do.

        Nothing is set aside for activations and the CUDA context.
        """
        if weight_bytes > memory_bytes:
            return None
        fits, too_many = 0, (self.max_context or 2**40) + 1
        while too_many - fits > 1:
            tokens = (fits + too_many) // 2
            if weight_bytes + self.cache_bytes(tokens) <= memory_bytes:
                fits = tokens
            else:
                too_many = tokens
        return fits

    def cache_bytes_per_token(self, context: int) -> int:
        """What the cache grows by with one more token after `context` tokens."""
        growing = (layer for layer in self.rehearsal.cache if layer.window is None or layer.window > context)
        return round(sum(layer.bytes_per_token for layer in growing))

    def to_dict(self, *, context: int, memory_bytes: int | None = None) -> dict[str, Any]:
        """Everything as plain values, `context` tokens being the length at which operations and cache are stated."""
        layer = self.moe_layers[0]
        mtp_layers = sum(each.is_mtp for each in self.moe_layers)
        facts: dict[str, Any] = {
            "model_type": self.model_type,
            "class": self.class_name,
            "layers": self.num_layers,
            "max_context": self.max_context,
            "experts": {
                "layers": len(self.moe_layers) - mtp_layers,
                "mtp_layers": mtp_layers,
                "routed": layer.num_experts,
                "per_token": layer.top_k,
                "has_shared": layer.shared_experts is not None,
                "parameters_each": self.num_per_expert,
            },
            "parameters": {
                "total": self.num_parameters,
                "active": self.num_active,
                "active_with_embeddings": self.num_active_with_embeddings,
                "by_kind": {kind: {"total": size, "active": used} for kind, (size, used) in self.by_kind().items()},
            },
            "flops_per_token": {
                "context": context,
                "forward": self.forward_flops(context),
                "attention": self.attention_flops(context),
                "training": self.training_flops(context),
            },
            "kv_cache": {
                "dtype": "bfloat16",
                "context": context,
                "bytes": self.cache_bytes(context),
                "bytes_per_token": self.cache_bytes_per_token(context),
                "layers": [{**asdict(kind), "layers": count} for kind, count in Counter(self.rehearsal.cache).items()],
            },
            "weights_bytes": self.weight_bytes(),
        }
        if memory_bytes is not None:
            fits = {name: self.context_that_fits(memory_bytes, size) for name, size in self.weight_bytes().items()}
            facts["memory"] = {"bytes": memory_bytes, "tokens_that_fit": fits}
        return facts


def measure_footprint(config: Any) -> Footprint:
    """The footprint of the causal language model of `config`, built on the meta device: no weights, seconds.

    Composite configs (vision, audio) are measured by their language model.

    Raises:
        UnsupportedModelError: If transformers has no causal language model for the config, or it has no routed experts.
    """
    model = _build_without_weights(config)
    moe_layers = find_moe_layers(model)
    text_config = model.config.get_text_config(decoder=True)
    return Footprint(
        model_type=text_config.model_type,
        class_name=type(model).__name__,
        num_layers=text_config.num_hidden_layers,
        max_context=getattr(text_config, "max_position_embeddings", None),
        moe_layers=tuple(moe_layers),
        parameters=tuple(sort_parameters(model, moe_layers)),
        rehearsal=rehearse(model),
    )


def _build_without_weights(config: Any) -> Any:
    text_config = copy.deepcopy(config.get_text_config(decoder=True))
    for auto_class, candidate in (
        (AutoModelForCausalLM, text_config),
        (AutoModelForImageTextToText, copy.deepcopy(config)),
    ):
        if type(candidate) in auto_class._model_mapping:
            with torch.device("meta"):
                return auto_class.from_config(candidate, dtype=torch.bfloat16)
    raise UnsupportedModelError(
        f"transformers has no causal language model of type {config.model_type!r}; expected a decoder with experts."
    )


def _fp8_scale_bytes(shape: tuple[int, ...]) -> int:
    *stack, rows, columns = shape
    return 4 * math.prod(stack) * math.ceil(rows / _BLOCK) * math.ceil(columns / _BLOCK)


def _int4_scale_bytes(shape: tuple[int, ...]) -> int:
    *rows, columns = shape
    return 2 * math.prod(rows) * math.ceil(columns / _BLOCK)
