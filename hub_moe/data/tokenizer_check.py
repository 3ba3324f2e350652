"""Whether tokenizer and model belong together."""

from typing import Any

from ..errors import DatasetError


def check_tokenizer(tokenizer: Any, model_config: Any) -> None:
    """Refuse a tokenizer that the model cannot be trained with.

    Raises:
        DatasetError: If it has ids that the model has no embedding for, or no token to end or to pad texts with.
    """
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise DatasetError(
            f"The tokenizer has ids up to {highest:,}, and the model ({config.model_type}) embeds "
            f"{config.vocab_size:,} tokens: use the tokenizer that is stored with the model."
        )
    for name, use in (("eos_token", "end"), ("pad_token", "pad")):
        if getattr(tokenizer, name) is None:
            raise DatasetError(
                f"The tokenizer has no {name} to {use} texts with: set tokenizer.{name} to one it knows."
            )


def check_packing(model_config: Any) -> None:
    """Refuse to pack for a model whose layers carry a state from one document to the next.

    transformers keeps packed documents apart in attention only.

    Raises:
        DatasetError: If the model has linear-attention or state-space layers.
    """
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    kinds = sorted({kind for kind in getattr(config, "layer_types", None) or () if "attention" not in kind})
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        kinds = ["linear_attention", *kinds]
    if kinds:
        raise DatasetError(
            f"{config.model_type} has {', '.join(kinds)} layers, through which packed documents would see each other; "
            "use packing = false."
        )
