"""Whether this machine multiplies 16-bit matrices as fast as float32 ones, found by trying.

A CPU without 16-bit units runs torch's bfloat16 and float16 products at 1 to 15 % of float32, and which units a build
of torch can use is not written anywhere; so a small product is timed, once a process.
"""

import functools
import time

import torch

_ROWS, _WIDTH, _TRIES = 64, 256, 3


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
