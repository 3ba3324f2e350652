"""What a training run will take, in plain arithmetic: operations, device hours, energy, CO2, money, memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from .devices import Precision
from .report import GridFactor, Rates

# Mixed precision with AdamW (arXiv:1910.02054 section 3.1): a bf16 copy of each weight; of a trained one also a bf16
# gradient, and in float32 the weight and two moments.
_BYTES_OF_A_WEIGHT = 2
_BYTES_OF_A_TRAINED_WEIGHT = 2 + 3 * 4


@dataclass(frozen=True)
class Workload:
    """What is to be computed.

    Attributes:
        flops_per_token: Of training: forward, and backward as far as it goes; nothing recomputed.
        attention_flops_per_token: The part of it that grows with the context; no discount for the causal mask.
        parameters: All that are held, MTP layers among them where they are trained.
        trained_parameters: Those with a gradient.
    """

    tokens: float
    flops_per_token: float
    attention_flops_per_token: float
    context: int
    parameters: int
    trained_parameters: int

    def __post_init__(self) -> None:
        for name in ("tokens", "flops_per_token", "parameters"):
            _check_positive(name, getattr(self, name))

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.tokens * self.flops_per_token


@dataclass(frozen=True)
class Machinery:
    """On what it is to be computed.

    Attributes:
        peak_flops: Operations per second of one device, at most, in `precision`.
        peak_source: Who says so.
        watts: Of one device; None is not known.
        watts_source: A data sheet's limit, a measurement, or the user.
        pue: The building's energy for each joule of the devices; None where nobody said: then counted as 1.
        memory_bytes: Of one device; None is not known.
    """

    name: str
    peak_flops: float
    peak_source: str
    precision: Precision = "bf16"
    devices: int = 1
    watts: float | None = None
    watts_source: str = ""
    pue: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        _check_positive("peak_flops", self.peak_flops)
        _check_positive("devices", self.devices)
        if self.watts is not None:
            _check_positive("watts", self.watts)
        if self.pue is not None and not (math.isfinite(self.pue) and self.pue >= 1):
            raise ConfigError(
                f"The PUE is {self.pue}; expected 1 or more: a building uses at least what its devices do."
            )


@dataclass(frozen=True)
class CostPlan:
    """What it will take. Everything but operations and parameters is an estimate."""

    workload: Workload
    machinery: Machinery
    utilisation: float
    utilisation_source: str
    grid: GridFactor | None = None
    rates: Rates = Rates()

    @property
    def device_hours(self) -> float:
        """Of one device."""
        return self.workload.flops / (self.machinery.peak_flops * self.utilisation) / 3600

    @property
    def wall_hours(self) -> float:
        """With all devices at work."""
        return self.device_hours / self.machinery.devices

    @property
    def kwh(self) -> float | None:
        """None without watts."""
        watts = self.machinery.watts
        return None if watts is None else watts * self.device_hours / 1000 * (self.machinery.pue or 1.0)

    @property
    def co2_kg(self) -> float | None:
        """CO2 equivalent; None without watts, or without a declared grid."""
        return None if self.kwh is None or self.grid is None else self.kwh * self.grid.g_per_kwh / 1000

    @property
    def usd(self) -> float | None:
        """By the rates given; None without."""
        return self.rates.cost(device_hours=self.device_hours, kwh=self.kwh)

    @property
    def state_bytes(self) -> float:
        """Weights, gradients and AdamW's state, of each device if shared out evenly; activations not counted."""
        work = self.workload
        whole = _BYTES_OF_A_WEIGHT * work.parameters + _BYTES_OF_A_TRAINED_WEIGHT * work.trained_parameters
        return whole / self.machinery.devices

    @property
    def fits(self) -> bool | None:
        """Whether `state_bytes` fit a device's memory, which is needed and not yet enough; None where not known."""
        memory = self.machinery.memory_bytes
        return None if memory is None else self.state_bytes <= memory

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("device_hours", "wall_hours", "kwh", "co2_kg", "usd", "state_bytes", "fits")
        return asdict(self) | {"flops": self.workload.flops} | {name: getattr(self, name) for name in derived}


def plan_cost(
    workload: Workload,
    machinery: Machinery,
    *,
    utilisation: tuple[float, str],
    grid: GridFactor | None = None,
    rates: Rates | None = None,
) -> CostPlan:
    """The plan at a utilisation of the devices' peak, given with who says so.

    Raises:
        ConfigError: If the utilisation is not above 0 and at most 1.
    """
    share, source = utilisation
    if not 0 < share <= 1:
        raise ConfigError(f"The utilisation is {share:g}; expected a share above 0 and at most 1, such as 0.35.")
    return CostPlan(workload, machinery, share, source, grid, rates or Rates())


def implied_utilisation(workload: Workload, *, device_hours: float, peak_flops: float) -> float:
    """The share of the peak that a run reached which took so many device hours.

    Raises:
        ConfigError: If no device of this peak can have done it in that time.
    """
    _check_positive("device hours", device_hours)
    share = workload.flops / (device_hours * 3600 * peak_flops)
    if share > 1:
        raise ConfigError(
            f"{device_hours:g} device hours are too few: at the full peak it takes {device_hours * share:.4g}."
        )
    return share


def summarise_run(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, str]:
    """Utilisation, peak of all devices in operations per second, and its source, of the rows of a `metrics.jsonl`.

    The mean is over time: each row counts for the seconds that it covers.

    Raises:
        ConfigError: If no row has a utilisation.
    """
    seconds = operations = tokens_before = 0.0
    peak, source = 0.0, ""
    for row in rows:
        speed = row.get("tokens_per_s")
        if not speed or row.get("utilisation") is None:
            continue
        row_s = (row["tokens"] - tokens_before) / speed
        tokens_before = row["tokens"]
        seconds += row_s
        operations += row["utilisation"] * row["peak_flops"] * row_s
        peak, source = row["peak_flops"], row["peak_source"]
    if not seconds:
        raise ConfigError("The run has no row with a utilisation yet; let it train, or give --utilisation.")
    return operations / seconds / peak, peak, source


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"The plan's {name} is {value:g}; expected more than 0.")
