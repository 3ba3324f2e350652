"""Whether this machine multiplies 16-bit matrices as fast as float32 ones, found by trying, and what to do if not.

A CPU without 16-bit units runs torch's bfloat16 and float16 products at 1 to 15 % of float32, and which units a build
of torch can use is not written anywhere; so a small product is timed, once a process. Where they are slow, linear
layers multiply float32 copies, forward and backward, and round what comes out: the same sums, rounded once.
"""

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers.utils.output_capturing import _active_collector, maybe_install_capturing_hooks

_ROWS, _WIDTH, _TRIES = 64, 256, 3
# from this many rows on a cast of the weight costs less than torch's slow forward product (measured with AVX2)
_FEWEST_ROWS = 16


def multiply(linear: Any, x: Tensor) -> Tensor:
    """`linear(x)`, by float32 products where those of its 16-bit weight are slow on this CPU.

    The output is the float32 one rounded to the dtype of `x`, and so are the gradients; beside what `linear` itself
    keeps for backward nothing is kept. Few rows without gradients, and layers that are more than their weight
    (adapters, quantisation, sharding, hooks), are called as they are; so is everything where `runs_as_written` says no.
    """
    device_type = x.device.type
    is_left = has_fast_products(x.dtype, device_type) or not runs_as_written(device_type)
    if is_left or not is_plain(linear, x, may_have_bias=True):
        output: Tensor = linear(x)
        return output
    weight, bias = linear.weight, linear.bias
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not trains and x.numel() < _FEWEST_ROWS * x.shape[-1]:
        return nn.functional.linear(x, weight, bias)
    product: Any = _WideProduct
    wide: Tensor = product.apply(x, weight, bias)
    return wide


def is_plain(linear: nn.Module, like: Tensor, *, may_have_bias: bool = False) -> bool:
    """Whether calling `linear` is nothing but a product with its weight, which lies beside `like`, and its bias."""
    if type(linear) is not nn.Linear or not is_untouched(linear):
        return False
    parameters = linear._parameters  # a module's attributes take ten times as long, and this is asked at every step
    weight, bias = parameters.get("weight"), parameters["bias"]
    return is_like(weight, like) and (bias is None or (may_have_bias and is_like(bias, like)))


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` is calling the forward of its class: there are no hooks, and it has no other forward."""
    return not (has_hooks(module) or all_modules._has_any_global_hook() or "forward" in vars(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` also calls hooks of its own that do something.

    Those that transformers puts into a model for good where outputs were once recorded do nothing while none are.
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks
    if not hooks:
        return False
    return bool(_active_collector.get()) or any(
        getattr(hook, "__module__", None) != maybe_install_capturing_hooks.__module__ for hook in hooks.values()
    )


def is_like(weight: Any, like: Tensor) -> bool:
    """Whether `weight` is a plain tensor of the dtype of `like`, beside it."""
    is_tensor = type(weight) in (nn.Parameter, Tensor)
    return is_tensor and bool(weight.dtype == like.dtype and weight.device == like.device)


def runs_as_written(device_type: str) -> bool:
    """Whether operations run one by one as they are: no autocast, compilation, tracing or transform of torch.func."""
    is_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not (is_graph or torch.is_autocast_enabled(device_type) or torch._C._are_functorch_transforms_active())


class _WideProduct(torch.autograd.Function):
    """A linear layer on 16-bit numbers, by float32 products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return nn.functional.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # twice differentiable, as it is only products
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        wide = dy.float()
        rows = wide.reshape(-1, wide.shape[-1])
        dx = (wide @ weight.float()).to(x.dtype) if needs_x else None
        dweight = None
        if needs_weight:
            dweight = (rows.mT @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        return dx, dweight, rows.sum(0).to(dy.dtype) if needs_bias else None


def has_fast_products(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products in `dtype` take at most twice as long as in float32; True for everything that is no CPU.

    The gap is never near two: 16-bit units make products faster than float32, and without them they take 7 to 100 times
    as long, so a busy machine does not change the answer.
    """
    if device_type != "cpu" or dtype.itemsize >= 4:
        return True
    return _is_fast_on_cpu(dtype)


@functools.cache
def _is_fast_on_cpu(dtype: torch.dtype) -> bool:
    return _seconds(dtype) <= 2 * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """Shortest time of x @ w.T and x @ w together."""
    with torch.inference_mode():
        x, w = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
        times = []
        for _ in range(_TRIES + 1):  # the first one also starts threads and makes kernels
            start = time.perf_counter()
            x @ w.T
            x @ w
            times.append(time.perf_counter() - start)
    return min(times[1:])
