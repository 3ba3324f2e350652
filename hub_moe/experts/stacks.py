"""The weights of an experts module as stacks, and whether Triton's kernels compute with them on a GPU.

`HUB_MOE_GPU_EXPERTS` says so: `triton` (an error where those cannot compute a layer), `grouped_mm` of transformers, or,
where it is not set, triton where it can, and otherwise, and while torch compiles, grouped_mm. `hub-moe env` tells
which, and why.
"""

import importlib.util
import os
import shutil
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from ..errors import ConfigError, UnsupportedModelError

IMPLEMENTATION = "hub_moe"  # in transformers' ExpertsInterface
SPLIT_IMPLEMENTATION = "hub_moe_split"  # the same for a layer of which some experts are trained
LIGER_IMPLEMENTATION = "hub_moe_liger"
GPU_VARIABLE = "HUB_MOE_GPU_EXPERTS"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed")
_INSTEAD = 'set experts_implementation="grouped_mm" for it'


class Stacks(NamedTuple):
    """The weights of all experts, (E, in, out), which may be transposed views, and their biases, (E, out)."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


def stacks_of(experts: Any) -> Stacks:
    """The stacks of a module of a class decorated with transformers' `use_experts_implementation`.

    Raises:
        UnsupportedModelError: For experts whose weights are not plain floating-point stacks, or that train parameters
            besides them.
    """
    if not all(hasattr(experts, flag) for flag in _LAYOUT_FLAGS):
        raise UnsupportedModelError(
            f"{type(experts).__name__} does not say how its experts are laid out; a class with transformers' "
            "use_experts_implementation was expected."
        )
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias") if experts.has_bias else (up, "down_proj")
    tensors = [getattr(experts, name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} of {type(experts).__name__} is a {type(tensor).__name__} of {tensor.dtype}, not a plain "
                f"floating-point tensor, which experts_implementation={IMPLEMENTATION!r} needs; {_INSTEAD}."
            )
    _check_other_parameters(experts, names)
    stacks = Stacks(*tensors, *[None] * (4 - len(names)))
    return stacks if experts.is_transposed else stacks._replace(up=stacks.up.mT, down=stacks.down.mT)


def has_post_expert_norm(experts: Any) -> bool:
    """Whether each expert's output passes a norm; modules of older transformers do not say, and have none."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def is_swiglu(experts: Any) -> bool:
    """Whether the activation is transformers' own gate with SiLU: silu of the first half times the second."""
    if not experts.has_gate or "_apply_gate" in vars(experts):
        return False
    gate, activation = getattr(type(experts), "_apply_gate", None), getattr(experts, "act_fn", None)
    is_silu = isinstance(activation, nn.SiLU | SiLUActivation) and not activation._forward_hooks
    is_silu = is_silu or activation is nn.functional.silu
    return is_silu and gate is not None and gate is getattr(moe, "_default_apply_gate", None)


def _check_other_parameters(experts: nn.Module, names: tuple[str, ...]) -> None:
    """The activation is differentiated by its input alone, so what else it may train would silently stay as it is."""
    for name, parameter in experts.named_parameters():
        first = name.partition(".")[0]
        if parameter.requires_grad and first not in (*names, "post_expert_norm", "parametrizations"):
            raise UnsupportedModelError(
                f"{type(experts).__name__} trains {name}, which experts_implementation={IMPLEMENTATION!r} gives no "
                f"gradient; {_INSTEAD}."
            )


def uses_triton(experts: Any, device: torch.device) -> bool:
    """Whether Triton's kernels compute this module on this device, which is no CPU.

    Raises:
        ConfigError: For another value of HUB_MOE_GPU_EXPERTS, or `triton` where it cannot be had.
    """
    asked = _asked_on_gpu()
    if asked == "grouped_mm":
        return False
    if torch.compiler.is_compiling():
        why_not: str | None = "torch is compiling the model, and they run outside of that; do not compile it"
    else:
        why_not = why_no_triton(device) or why_not_triton_for(experts)
    if why_not and asked:
        raise ConfigError(f"{GPU_VARIABLE}=triton cannot be had: {why_not}. Set it to grouped_mm, or unset it.")
    return why_not is None


def describe_gpu_choice() -> tuple[str, str]:
    """What computes experts on the GPUs of this machine, and why that.

    Raises:
        ConfigError: As `uses_triton`, as far as the machine goes.
    """
    asked = _asked_on_gpu()
    if asked == "grouped_mm":
        return "grouped_mm of transformers", f"{GPU_VARIABLE}=grouped_mm"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    reasons = [why_no_triton(device) for device in devices] or ["there is no GPU that CUDA can use"]
    why_not = next((reason for reason in reasons if reason), None)
    if why_not and asked and devices:
        raise ConfigError(f"{GPU_VARIABLE}=triton cannot be had: {why_not}. Set it to grouped_mm, or unset it.")
    if why_not:
        return "grouped_mm of transformers", why_not
    why = f"{GPU_VARIABLE}=triton" if asked else "triton is installed, and the GPUs are of the kind it is for"
    return "triton", f"{why}; grouped_mm for layouts it does not know and while torch compiles"


@cache
def why_no_triton(device: torch.device) -> str | None:
    """What speaks against Triton's kernels on a device, as half a sentence; None if nothing does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for CUDA devices, not for {device.type if device.type != 'cuda' else 'ROCm'}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "triton needs a C compiler, and none is on the PATH"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, found = (".".join(map(str, each)) for each in (_LEAST_CAPABILITY, capability))
        return f"the kernels need compute capability {least}; {torch.cuda.get_device_name(device)} has {found}"
    return None


def why_not_triton_for(experts: Any) -> str | None:
    """What speaks against Triton's kernels for a module, as half a sentence; None if nothing does."""
    try:
        stacks = stacks_of(experts)
    except UnsupportedModelError as error:
        return str(error).rstrip(".")
    if has_post_expert_norm(experts):
        return "the kernels have no norm behind the experts"
    dtypes = {each.dtype for each in stacks if each is not None}
    if len(dtypes) > 1 or not dtypes <= set(TRITON_DTYPES):
        return f"the kernels are for bfloat16, float16 or float32, one for all stacks, not {sorted(map(str, dtypes))}"
    return None


def _asked_on_gpu() -> str:
    asked = os.environ.get(GPU_VARIABLE, "")
    if asked not in ("", "triton", "grouped_mm"):
        raise ConfigError(f"{GPU_VARIABLE} is {asked!r}; triton, grouped_mm or nothing was expected.")
    return asked
