"""Whether this processor multiplies bfloat16 matrices faster than it casts them and multiplies float32.

torch has fast bfloat16 products only where the processor has instructions for them (AVX512_BF16, AMX); elsewhere it is
up to a hundred times slower than in float32 (https://github.com/pytorch/pytorch/issues/146508), and which it is depends
on torch's build too. So it is measured, once, and written to the user's cache: rounding must not change between runs.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

_ROWS, _SIZE, _TRIES = 32, 512, 7


def cache_folder() -> Path:
    """Where what was built or measured for this machine is kept: `hub_moe` in the user's cache folder."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one counts as none, says the specification
    return (asked if asked.is_absolute() else Path.home() / ".cache") / "hub_moe"


def describe_processor() -> str:
    """The processor's architecture and, where the system tells them, its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {' '.join(sorted(flags.split()))}"


@cache
def has_fast_bfloat16() -> bool:
    """The measured answer for this processor and torch; see `measure_bfloat16`."""
    return bool(bfloat16_record()["is_fast"])


def bfloat16_record() -> dict[str, Any]:
    """The measurement from the cache, or a new one, kept there if the folder can be written.

    Keys: `is_fast`, `bfloat16_gflops`, `cast_gflops`: the slowest of the three products, in billions of operations a
    second, in bfloat16 and by a cast to float32.
    """
    settings = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    key = "\n".join([describe_processor(), torch.__version__, *settings])
    path = cache_folder() / f"bfloat16-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = measure_bfloat16()
        _write(path, record)
    return record


def measure_bfloat16() -> dict[str, Any]:
    """Time the products of a forward and a backward pass both ways; a few milliseconds, or 0.2 s where it is slow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, _SIZE, generator=generator).bfloat16()
    w = torch.randn(_SIZE, _SIZE, generator=generator).bfloat16()
    x32, w32 = x.float(), torch.empty(_SIZE, _SIZE, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        plain = max(map(_seconds, (lambda: x @ w.mT, lambda: x @ w, lambda: x.mT @ x)))
        casts = (lambda: x32 @ w32.copy_(w).mT, lambda: x32 @ w32.copy_(w), lambda: (x32.mT @ x32).bfloat16())
        cast = max(map(_seconds, casts))
    operations = 2 * _ROWS * _SIZE * _SIZE / 1e9
    return {
        "is_fast": plain < cast,
        "bfloat16_gflops": round(operations / plain, 1),
        "cast_gflops": round(operations / cast, 1),
    }


def _seconds(product: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return best


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written only costs the next process the measurement."""
    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(record), encoding="utf-8")
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
