"""Which products the experts on the CPU use: see `choose_products`."""

import torch

from .torch_products import Products, TorchProducts


def choose_products(dtype: torch.dtype) -> Products:
    """The products for weights of `dtype`."""
    return TorchProducts()
