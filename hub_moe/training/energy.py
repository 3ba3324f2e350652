"""Energy of a run, by codecarbon: measured where the machine has counters, estimated elsewhere, and labelled so."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from ..errors import HubMoeError, MissingExtraError

try:
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.output_methods.base_output import BaseOutput
except ImportError as error:
    raise MissingExtraError("Measuring energy needs codecarbon: pip install 'hub_moe[train]'.") from error

_SAMPLE_EVERY_S = 5.0
# what codecarbon calls its sources; whatever is not in here is a model of the hardware
_MEASURED_CPU = {
    "intel_rapl": "RAPL",
    "windows_emi": "Windows energy meter",
    "intel_power_gadget": "Intel Power Gadget",
}


@dataclass(frozen=True)
class EnergyReading:
    """Energy since the meter started, in kWh.

    Args:
        kwh: All parts together.
        seconds: Time it covers.
        parts: Of cpu, gpu and ram.
        sources: Of each part "measured (...)" or "estimated (...)".
    """

    kwh: float
    seconds: float
    parts: dict[str, float]
    sources: dict[str, str]

    @property
    def label(self) -> str:
        """ "measured" only if every part that uses energy is; otherwise which are estimated."""
        estimated = [part for part, source in self.sources.items() if not source.startswith("measured")]
        if not estimated:
            return "measured"
        return f"estimated for {', '.join(estimated)}" if len(estimated) < len(self.sources) else "estimated"


class EnergyMeter:
    """Energy of the whole machine from now until `stop`, sampled every few seconds by a thread of codecarbon.

    No network, and no files. The machine, not the process, is metered: other programs count too.

    Raises:
        HubMoeError: If codecarbon cannot start.
    """

    def __init__(self) -> None:
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads `log_level`
        self._newest = _Newest()
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code="USA",  # only its CO2 figure, which is not used, depends on it
            output_methods=[],
            emissions_endpoint=None,  # given, so that a file of settings in the user's home cannot turn it on
            pue=1.0,
            output_handlers=[self._newest],
            api_call_interval=-1,
            measure_power_secs=_SAMPLE_EVERY_S,
            allow_multiple_runs=True,
            log_level="critical",
        )
        self._tracker.start()
        # codecarbon turns its own errors into log lines
        if getattr(self._tracker, "_start_time", None) is None:
            raise HubMoeError("codecarbon cannot start on this machine; train without the energy figure.")
        self._sources = dict(_describe(hardware) for hardware in self._tracker._hardware)
        self._read_at_s = float("-inf")

    def read(self) -> EnergyReading:
        """The newest figures; they are at most a few seconds old, and `seconds` says what they cover."""
        now_s = time.monotonic()
        if now_s - self._read_at_s >= _SAMPLE_EVERY_S:
            self._tracker.flush()
            self._read_at_s = now_s
        return self._reading()

    def stop(self) -> EnergyReading:
        """End metering; the final figures."""
        self._tracker.stop()
        return self._reading()

    def _reading(self) -> EnergyReading:
        data = self._newest.data
        if data is None:
            raise HubMoeError("codecarbon gave no figures; train without the energy figure.")
        parts = {part: float(getattr(data, f"{part}_energy")) for part in self._sources}
        return EnergyReading(sum(parts.values()), float(data.duration), parts, self._sources)


class _Newest(BaseOutput):
    """Keeps what codecarbon hands out when asked to flush."""

    def __init__(self) -> None:
        self.data: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.data = total

    def live_out(self, total: Any, delta: Any) -> None:
        self.data = total


def _describe(hardware: Any) -> tuple[str, str]:
    """Part and source of one of codecarbon's hardware objects."""
    kind = type(hardware).__name__
    if kind == "GPU":
        return "gpu", "measured (NVML)" if "nvidia" in _gpu_modules(hardware) else "measured (AMD SMI)"
    if kind == "CPU":
        mode = hardware._mode
        return "cpu", f"measured ({_MEASURED_CPU[mode]})" if mode in _MEASURED_CPU else f"estimated (TDP x {mode})"
    if kind in ("AppleSiliconChip", "Raspberry"):
        return hardware.chip_part.lower(), f"measured ({kind})"
    return "ram", "estimated (watts per module)"


def _gpu_modules(hardware: Any) -> str:
    return " ".join(type(device).__module__ for device in hardware.devices.devices)
