"""Operations that training a model costs, of what is really trained, and the most a device can do."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..anatomy import Footprint, MoeLayer, measure_footprint
from ..energy.devices import recognise_device

PlannedMethod = Literal["full", "experts", "lora"]
_MATRIX = 1024
_REPEATS = 4


@dataclass(frozen=True)
class Peak:
    """Operations per second of one device; `source` is "published: ..." or "measured: ..."."""

    flops: float
    source: str


@dataclass(frozen=True)
class TrainingCost:
    """What one token of training costs, recomputed activations not counted.

    A weight costs 2 operations forward, 2 more where a gradient passes back through it, and 2 more where it is trained
    itself (arXiv:2001.08361 section 2.1 counts 6 where all are): a frozen weight in between costs 4.

    Args:
        footprint: Of the model's config.
        active: Weights a token meets, MTP layers included where they are trained.
        passed_back: Those at or above the first trained layer.
        trained: Trained weights a token meets: under even load K / E of those of routed experts.
        attention_passed_back: Share of the attention at or above the first trained layer.
    """

    footprint: Footprint
    active: float
    passed_back: float
    trained: float
    attention_passed_back: float

    def flops_per_token(self, context: float) -> float:
        """Operations for a token in sequences of `context` tokens."""
        attention = self.footprint.attention_flops(round(context)) * (1 + 2 * self.attention_passed_back)
        return 2 * (self.active + self.passed_back + self.trained) + attention


def measure_training_cost(model: Any, layers: Sequence[MoeLayer]) -> TrainingCost:
    """The cost of a model as its parameters' `requires_grad` stand now; `layers` as `find_moe_layers` returns them.

    Raises:
        UnsupportedModelError: If the model cannot be built and run without weights.
    """
    footprint = measure_footprint(model.config)
    first_trained = _first_trained_layer(model, footprint.num_layers)
    mtp_layers = [layer for layer in footprint.moe_layers if layer.is_mtp]
    runs_mtp = bool(mtp_layers and getattr(model.config, "mtp_loss_coef", 0))
    active = [(p.name, float(p.active_size)) for p in footprint.parameters if p.is_matrix]
    active += _active_in_mtp(footprint, mtp_layers) if runs_mtp else []
    return TrainingCost(
        footprint=footprint,
        active=sum(size for _, size in active),
        passed_back=sum(size for name, size in active if _layer_number(name, footprint.num_layers) >= first_trained),
        trained=_active_and_trained(model, layers, runs_mtp=runs_mtp),
        attention_passed_back=1 - min(1.0, first_trained / footprint.num_layers),
    )


@dataclass(frozen=True)
class PlannedCost:
    """The cost of training a shape, and how many numbers are held and trained; of what depends on data, the most."""

    cost: TrainingCost
    parameters: int
    trained_parameters: int
    runs_mtp: bool


def plan_training_cost(
    footprint: Footprint, config: Any, method: PlannedMethod, *, expert_share: float = 0.2, rank: int = 8
) -> PlannedCost:
    """What training the model of a config will cost, by method, before there are weights.

    Args:
        footprint: Of `config`.
        config: Says whether MTP layers are trained.
        method: `full` trains everything, from random weights or not. `experts` trains routed experts. `lora` trains
            adapters at every projection of the attention.
        expert_share: Of the tokens' ways through experts, the share that ends at a trained one: ESFT's top_p. The
            chosen experts are the busiest, so that at most this share of the experts is trained.
        rank: Of the adapters.
    """
    mtp_layers = [layer for layer in footprint.moe_layers if layer.is_mtp]
    runs_mtp = bool(mtp_layers and getattr(config.get_text_config(decoder=True), "mtp_loss_coef", 0))
    used = [p for p in footprint.parameters if runs_mtp or p.kind != "mtp"]
    active = [(p.name, float(p.active_size)) for p in footprint.parameters if p.is_matrix]
    active += _active_in_mtp(footprint, mtp_layers) if runs_mtp else []
    weights = sum(size for _, size in active)
    experts = tuple(f"{layer.name}.experts." for layer in footprint.moe_layers)
    adapters = rank * sum(sum(p.shape) for p in used if p.kind_in_layer == "attention" and len(p.shape) == 2)
    trained, numbers, first = {
        "full": (weights, sum(p.size for p in used), 0),
        "experts": (
            expert_share * sum(size for name, size in active if name.startswith(experts)),
            round(expert_share * sum(p.size for p in used if p.kind_in_layer == "routed_experts")),
            min(layer.index for layer in footprint.moe_layers),
        ),
        "lora": (0.0, adapters, 0),
    }[method]
    # an adapter is met forward, passed back through, and trained, as any trained weight
    added = float(adapters) if method == "lora" else 0.0
    cost = TrainingCost(
        footprint=footprint,
        active=weights + added,
        passed_back=sum(size for name, size in active if _layer_number(name, footprint.num_layers) >= first) + added,
        trained=trained + added,
        attention_passed_back=1 - min(1.0, first / footprint.num_layers),
    )
    return PlannedCost(cost, sum(p.size for p in used) + round(added), numbers, runs_mtp)


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The published dense bfloat16 peak of a known GPU; of any other device what a matrix product measures now."""
    if device.type == "cuda":
        known = recognise_device(torch.cuda.get_device_name(device))
        if known is not None:
            return Peak(known.bf16_flops, f"published: {known.source}")
    return _measure_peak(device, dtype)


def _measure_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    left = torch.ones(_MATRIX, _MATRIX, device=device, dtype=dtype)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (left @ left)[0, 0].item()  # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    label = f"measured: {_MATRIX} x {_MATRIX} {str(dtype).removeprefix('torch.')} matrix product"
    return Peak(2 * _MATRIX**3 / min(seconds), label)


def _active_in_mtp(footprint: Footprint, mtp_layers: Sequence[MoeLayer]) -> list[tuple[str, float]]:
    """MTP layers, which only training runs: K of E experts of each, and the head once more for each."""
    share = mtp_layers[0].top_k / mtp_layers[0].num_experts
    head = sum(p.active_size for p in footprint.parameters if p.kind == "head" and p.is_matrix)
    own = [
        (p.name, p.size * (share if p.kind_in_layer == "routed_experts" else 1.0))
        for p in footprint.parameters
        if p.kind == "mtp" and p.is_matrix
    ]
    return [*own, *((layer.name, float(head)) for layer in mtp_layers)]


def _active_and_trained(model: nn.Module, layers: Sequence[MoeLayer], *, runs_mtp: bool) -> float:
    embeddings, head = _ends(model)
    share_of_experts = {f"{layer.name}.experts.": layer.top_k / layer.num_experts for layer in layers}
    mtp_layers = tuple(f"{layer.name.rpartition('.')[0]}." for layer in layers if layer.is_mtp)
    total = 0.0
    for name, parameter in model.named_parameters():
        is_idle = (parameter is embeddings and parameter is not head) or (not runs_mtp and name.startswith(mtp_layers))
        share = next((share for block, share in share_of_experts.items() if name.startswith(block)), None)
        is_matrix = parameter.dim() == 2 or (parameter.dim() == 3 and share is not None)
        if parameter.requires_grad and is_matrix and not is_idle:
            uses = 1 + len(mtp_layers) if runs_mtp and parameter is head else 1
            total += parameter.numel() * uses * (1.0 if share is None else share)
    return total


def _first_trained_layer(model: nn.Module, num_layers: int) -> int:
    """The lowest decoder layer that a gradient has to reach; `num_layers` where only what follows them is trained."""
    embeddings, _ = _ends(model)
    if embeddings is not None and embeddings.requires_grad:
        return 0
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return min((_layer_number(name, num_layers) for name in trained), default=num_layers + 1)


def _layer_number(parameter_name: str, num_layers: int) -> int:
    """What stands outside of the layers, as final norm and head do, counts as after them."""
    found = re.search(r"\.(\d+)\.", f"{parameter_name}.")
    return int(found[1]) if found else num_layers


def _ends(model: Any) -> tuple[Any, Any]:
    """Weights of the input embedding and the head; None where there is none."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(embedding, "weight", None), getattr(head, "weight", None)
