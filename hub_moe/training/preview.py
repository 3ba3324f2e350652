"""What a run would train, and on how much, without training."""

from typing import Any

from ..anatomy import find_moe_layers, named_tensors
from ..data import load_rows
from .choosing import choose_experts
from .method_config import ExpertsMethod, LoraMethod
from .methods import Prepared, prepare_model
from .processes import count
from .run_config import RunConfig
from .run_data import check_fit, check_packed_model, find_tokenizer, prepare_rows
from .run_model import fit_vocabulary, load_base, read_architecture, sketch_model
from .session import count_steps, find_trackers, split_batch

_ADAM_BYTES = 2  # moments of each trained number, in its own type


def preview_run(config: RunConfig) -> dict[str, Any]:
    """What `run_training` would do: numbers by kind, rows, tokens, steps and memory; nothing is written.

    Weights are read only where the run chooses experts itself. Memory leaves activations out.

    Raises:
        ConfigError, DatasetError: As `run_training`.
    """
    architecture = read_architecture(config.model)
    find_trackers(config.training)
    rows = load_rows(config.data.rows)
    tokenizer = find_tokenizer(config, rows, revision=architecture.revision)
    if config.model.learn_vocab_size is not None:
        fit_vocabulary(architecture.config, tokenizer)
    check_fit(config, tokenizer, architecture.config)
    data = prepare_rows(config, rows, tokenizer)
    split_batch(config, count())
    choice = None
    if isinstance(config.method, ExpertsMethod):
        base = load_base(config.model, revision=architecture.revision) if config.method.choice is None else None
        if base is not None:
            check_packed_model(config, base, data)
        choice = choose_experts(base, data, config, config.method).choice
    prepared = prepare_model(sketch_model(architecture.config), config, choice)
    steps = count_steps(config.training, len(data.train))
    side = data.report.train
    trained = sum(parameter.numel() for parameter in prepared.model.parameters() if parameter.requires_grad)
    return {
        "method": config.method.NAME,
        "by_kind": _count_by_kind(prepared),
        "adapter": trained if isinstance(config.method, LoraMethod) else None,
        "numbers": {"all": sum(row["numbers"] for row in _count_by_kind(prepared).values()), "trained": trained},
        "experts": None if choice is None else choice.to_dict()["experts"],
        "rows": len(data.train),
        "held_out_rows": len(data.held_out),
        "tokens": side.tokens,
        "steps": steps,
        "tokens_in_run": round(steps * config.training.batch_size * side.tokens / len(data.train)),
        "memory_bytes": _estimate_memory(prepared, parts=config.training.fsdp_size),
    }


def _count_by_kind(prepared: Prepared) -> dict[str, dict[str, int]]:
    base = prepared.model.get_base_model() if hasattr(prepared.model, "peft_config") else prepared.model
    counts: dict[str, dict[str, int]] = {}
    for name, kind, _, view in named_tensors(base, find_moe_layers(base)):
        if ".lora_" in name:
            continue
        row = counts.setdefault(kind, {"numbers": 0, "trained": 0})
        row["numbers"] += view.numel()
        row["trained"] += view.numel() if name in prepared.trained else 0
    return counts


def _estimate_memory(prepared: Prepared, *, parts: int) -> dict[str, int]:
    """Of each process, where `parts` of them share a model out."""
    parameters = list(prepared.model.parameters())
    gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad) // parts
    return {
        "weights": sum(parameter.nbytes for parameter in parameters) // parts,
        "gradients": gradients,
        "optimizer": _ADAM_BYTES * gradients,
    }
