"""Whether a model keeps the documents of a packed row apart, by trying.

A model tells them apart only if its forward hands `position_ids` on to transformers' masks, which nothing in its config
says. Shape letters: B batch, L sequence, D width.
"""

from typing import Any

import torch
from torch import Tensor

from ..data.token_rows import PackedCollator
from ..errors import DatasetError
from .profiling import eval_mode

_DOCUMENT_TOKENS = 128  # long enough for layers that attend to a compressed history to have one


def check_documents_apart(model: Any, tokens_L: Tensor) -> None:
    """Refuse to pack for a model in which the second of two packed documents depends on the first.

    Args:
        model: A causal language model, in any mode and dtype; nothing of it changes.
        tokens_L: Any tokens it may see.

    Raises:
        DatasetError: If the documents see each other.
    """
    wanted = 2 * _DOCUMENT_TOKENS
    tokens_L = tokens_L.repeat(-(-wanted // len(tokens_L)))[:wanted]
    positions_L = torch.arange(_DOCUMENT_TOKENS).repeat(2)
    row = {"input_ids": tokens_L, "labels": tokens_L, "position_ids": positions_L}
    gradient_BLD = _gradient_of_second(model, PackedCollator()([row]))
    # a masked key has a weight of exactly 0, so no tolerance is needed; what is not finite stops the training itself
    if (gradient_BLD[:, :_DOCUMENT_TOKENS].abs() > 0).any():
        raise DatasetError(
            f"Documents of a packed row would see each other in a model of type {model.config.model_type}; "
            "set packing = false."
        )


def _gradient_of_second(model: Any, batch: dict[str, Any]) -> Tensor:
    """How the last hidden states of the second document depend on the embeddings (B, L, D) of both."""
    embeddings: list[Tensor] = []

    def watch(module: Any, inputs: Any, embedded_BLD: Tensor) -> Tensor:
        embeddings.append(embedded_BLD.detach().requires_grad_())
        return embeddings[-1]

    embedding = model.get_input_embeddings()
    inputs = {
        name: value.to(embedding.weight.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad(), eval_mode(model):
            hidden_BLD = getattr(model, "base_model", model)(**inputs).last_hidden_state
            second_BLD = hidden_BLD[:, _DOCUMENT_TOKENS:].float()
            # weights that differ, since a norm may hold the sum and the square of what it gives constant
            weights_D = torch.linspace(-1, 1, second_BLD.shape[-1], device=second_BLD.device)
            gradient_BLD: Tensor
            (gradient_BLD,) = torch.autograd.grad((second_BLD * weights_D).sum(), embeddings[:1])
    finally:
        handle.remove()
    return gradient_BLD
