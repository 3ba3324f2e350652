"""What devices can do at most, by their makers' own words: dense operations, power of the board, memory."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

Precision = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        pattern: Of the name that CUDA gives it.
        bf16_flops: Dense bfloat16 operations per second with float32 accumulation.
        fp8_flops: Dense 8-bit ones; None where it has none.
        watts: Most that the board draws.
        memory_bytes: As its maker rounds it, in powers of ten.
    """

    name: str
    pattern: str
    bf16_flops: float
    fp8_flops: float | None
    watts: float
    memory_bytes: int
    source: str

    def peak_flops(self, precision: Precision) -> float:
        """Operations per second.

        Raises:
            ConfigError: If it has no 8-bit operations.
        """
        if precision == "bf16":
            return self.bf16_flops
        if self.fp8_flops is None:
            raise ConfigError(f"The device {self.name} has no FP8 operations; plan with --precision bf16.")
        return self.fp8_flops


_GB = 10**9
_HOPPER = "NVIDIA H100 architecture whitepaper"
# The first whose pattern fits a name counts. NVIDIA's data sheets quote sparse figures; these are the dense halves.
DEVICES = (
    Device("h200-nvl", r"\bH200 NVL\b", 835.5e12, 1671e12, 600, 141 * _GB, "NVIDIA H200 datasheet, NVL"),
    Device("h200", r"\bH200\b", 989.4e12, 1978.9e12, 700, 141 * _GB, "NVIDIA H200 datasheet"),
    Device("h100-nvl", r"\bH100 NVL\b", 835.5e12, 1671e12, 400, 94 * _GB, "NVIDIA H100 NVL product brief"),
    Device("h100-pcie", r"\bH100 PCIe\b", 756.4e12, 1513e12, 350, 80 * _GB, f"{_HOPPER}, PCIe"),
    Device("h100", r"\bH100\b", 989.4e12, 1978.9e12, 700, 80 * _GB, f"{_HOPPER}, SXM5"),
    # an H100 with slower links between boards and almost no float64; its tensor cores are the same
    Device("h800", r"\bH800(?! PCIe)\b", 989.4e12, 1978.9e12, 700, 80 * _GB, f"{_HOPPER}, SXM5"),
    Device("a100", r"\bA100\b", 312.0e12, None, 400, 80 * _GB, "NVIDIA A100 architecture whitepaper"),
    Device("l40s", r"\bL40S\b", 362.05e12, 733e12, 350, 48 * _GB, "NVIDIA L40S datasheet"),
    Device("rtx4090", r"\bRTX 4090$", 165.2e12, 330.3e12, 450, 24 * _GB, "NVIDIA Ada architecture whitepaper"),
)


def find_device(name: str) -> Device:
    """The device of a short name such as `h800`.

    Raises:
        ConfigError: On an unknown name, and on `cpu`, whose speed no table can know.
    """
    known = {device.name: device for device in DEVICES}
    wanted = re.sub(r"[\s_]", "-", name.strip().lower())
    found = known.get(wanted) or known.get(wanted.replace("-", ""))
    if found is not None:
        return found
    if wanted == "cpu":
        raise ConfigError("Processors differ too much for a table; give --tflops, or --measured with a run of yours.")
    near = difflib.get_close_matches(wanted, known, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}; or give --tflops."
    raise ConfigError(f"There is no device {name!r}; {hint}")


def recognise_device(cuda_name: str) -> Device | None:
    """The device that CUDA calls so; None for one that the table lacks."""
    return next((device for device in DEVICES if re.search(device.pattern, cuda_name)), None)
