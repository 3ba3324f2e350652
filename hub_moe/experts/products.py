"""Which products the experts on the CPU use: the compiled ones, or those of torch alone.

`HUB_MOE_CPU_EXPERTS` says which: `compiled` (an error where they cannot be had), `torch`, or, where it is not set,
compiled if this machine can build and run them, and torch otherwise. `hub-moe env` tells which that is, and why.
"""

import os
from functools import cache

import torch

from ..errors import ConfigError, UnsupportedModelError
from .compiled_products import DTYPES, load_compiled_products
from .torch_products import Products, TorchProducts

VARIABLE = "HUB_MOE_CPU_EXPERTS"
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
