"""The fused experts of liger-kernel on a GPU, for who asks for `experts_implementation="hub_moe_liger"`.

Importing this registers them; nothing takes them by itself.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import MissingExtraError, UnsupportedModelError
from .stacks import IMPLEMENTATION, LIGER_IMPLEMENTATION, has_post_expert_norm, is_swiglu, stacks_of


def liger_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function registered in transformers' ExpertsInterface as `hub_moe_liger`; arguments and result as above.

    liger-kernel's LigerFusedMoEFunction, https://github.com/linkedin/Liger-Kernel. The processor waits for the GPU once
    a layer, and the gradient of the weights is summed in no fixed order.

    Raises:
        MissingExtraError: Without liger-kernel.
        UnsupportedModelError: For experts that it does not know: others than silu(gate) * up without biases, weights
            of another dtype than the hidden states, or experts spread over processes.
    """
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError as error:
        raise MissingExtraError(
            f'experts_implementation="{LIGER_IMPLEMENTATION}" needs liger-kernel: `pip install liger-kernel`.'
        ) from error
    why_not = _why_no_liger(experts, hidden_states)
    if why_not:
        raise UnsupportedModelError(
            f'experts_implementation="{LIGER_IMPLEMENTATION}" cannot compute {type(experts).__name__}: {why_not}; set '
            f'experts_implementation="{IMPLEMENTATION}" for it.'
        )
    expert_TK = top_k_index.to(torch.int32)
    inputs = (hidden_states, experts.gate_up_proj, experts.down_proj, expert_TK, top_k_weights)
    out_TD: Tensor = LigerFusedMoEFunction.apply(*inputs)
    return out_TD


def _why_no_liger(experts: Any, hidden_states: Tensor) -> str | None:
    stacks = stacks_of(experts)
    if not is_swiglu(experts) or experts.has_bias or experts.is_transposed or has_post_expert_norm(experts):
        return "liger-kernel knows silu(gate) * up alone, without biases and norms, one row of a matrix per output"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    if {stacks.up.dtype, stacks.down.dtype} != {hidden_states.dtype}:
        return f"its weights are {stacks.up.dtype}, and the hidden states {hidden_states.dtype}"
    if hidden_states.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it lies on the CPU, and liger-kernel computes on GPUs"
    return None


ALL_EXPERTS_FUNCTIONS.register(LIGER_IMPLEMENTATION, liger_experts_forward)
