"""Experts that are called by themselves."""

from typing import Any


def with_experts_apart(model: Any) -> Any:
    """`model`, whose experts no compiled decoding step computes together with other modules: hooks want to see them.

    For a few tokens such a step adds up in another order, and so rounds otherwise in the last place.
    """
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            module.register_forward_hook(lambda *_: None)
    return model
