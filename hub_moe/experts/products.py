"""Which products the experts use: on the CPU compiled ones or those of torch, on a GPU Triton's or transformers'.

`HUB_MOE_CPU_EXPERTS` says which: `compiled` (an error where they cannot be had), `torch`, or, where it is not set,
compiled if this machine can build and run them, and torch otherwise.

`HUB_MOE_GPU_EXPERTS` says which: `triton` (an error where those cannot compute a layer), `grouped_mm`, or, where it is
not set, triton where it can, and otherwise, and while torch compiles, grouped_mm. `hub-moe env` tells which, and why.
"""

import importlib.util
import os
import shutil
from functools import cache
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedModelError
from .compiled_products import DTYPES, load_compiled_products
from .stacks import has_post_expert_norm, stacks_of
from .torch_products import Products, TorchProducts

VARIABLE = "HUB_MOE_CPU_EXPERTS"
GPU_VARIABLE = "HUB_MOE_GPU_EXPERTS"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_TORCH = TorchProducts()


def choose_products(dtype: torch.dtype) -> Products:
    """The products for weights of `dtype`.

    Raises:
        ConfigError: For another value of HUB_MOE_CPU_EXPERTS, or `compiled` where they cannot be had.
        UnsupportedModelError: For `compiled` and weights that are neither float32 nor bfloat16.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked == "torch":
        return _TORCH
    if asked == "compiled":
        if dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{VARIABLE}=compiled is for float32 and bfloat16 weights, not {dtype}; set it to torch, or unset it."
            )
        return load_compiled_products()
    if asked:
        raise ConfigError(f"{VARIABLE} is {asked!r}; compiled, torch or nothing was expected.")
    return _default()[0] if dtype in DTYPES else _TORCH


def describe_choice() -> tuple[str, str]:
    """The name of the products in use for float32 and bfloat16 weights, and why those.

    Raises:
        ConfigError: As `choose_products`.
    """
    asked = os.environ.get(VARIABLE, "")
    name = choose_products(torch.float32).name
    return name, f"{VARIABLE}={asked}" if asked else _default()[1]


@cache
def _default() -> tuple[Products, str]:
    try:
        return load_compiled_products(), "a compiler was found, and this processor is one of those it is for"
    except ConfigError as error:
        return _TORCH, str(error)


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
