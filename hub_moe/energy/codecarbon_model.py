"""What only codecarbon knows: its model of processors and memory, counters of rarer machines, CO2 of countries."""

import difflib
import logging
import time
from typing import Any

from ..errors import ConfigError, HubMoeError, MissingExtraError
from .report import JOULES_PER_KWH, Component, ComponentEnergy, GridFactor, Method

try:
    from codecarbon import OfflineEmissionsTracker
    from codecarbon._version import __version__
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource
    from codecarbon.output_methods.base_output import BaseOutput
except ImportError as error:
    raise MissingExtraError(
        "Estimating energy or a country's CO2 needs codecarbon: pip install 'hub_moe[train]'."
    ) from error

_SAMPLE_EVERY_S = 5.0
# what codecarbon calls its sources; whatever is not in here is a model of the hardware
_COUNTERS = {
    "intel_rapl": "RAPL",
    "windows_emi": "Windows energy meter",
    "intel_power_gadget": "Intel Power Gadget",
}


class CodecarbonReader:
    """Energy of the whole machine as codecarbon sees it, sampled every few seconds by its thread.

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
            raise HubMoeError("codecarbon cannot start on this machine; run without the energy figure.")
        # what it says of NVIDIA's boards is 0 where they have no counter; those are read by NVML instead
        described = [_describe(hardware) for hardware in self._tracker._hardware if not _is_nvidia(hardware)]
        self._sources = {component: (method, note) for component, method, note in described}
        self._read_at_s = float("-inf")

    def read(self) -> list[ComponentEnergy]:
        """The newest figures; they are at most a few seconds old, and `window_s` says what they cover."""
        now_s = time.monotonic()
        if now_s - self._read_at_s >= _SAMPLE_EVERY_S:
            self._tracker.flush()
            self._read_at_s = now_s
        return self._reading()

    def stop(self) -> list[ComponentEnergy]:
        """End metering; the final figures."""
        self._tracker.stop()
        return self._reading()

    def _reading(self) -> list[ComponentEnergy]:
        data = self._newest.data
        if data is None:
            raise HubMoeError("codecarbon gave no figures; run without the energy figure.")
        return [
            ComponentEnergy(
                component,
                method,
                joules=float(getattr(data, f"{component}_energy")) * JOULES_PER_KWH,
                window_s=float(data.duration),
                scope="board" if component == "gpu" else "machine",
                note=note,
            )
            for component, (method, note) in self._sources.items()
        ]


class _Newest(BaseOutput):
    """Keeps what codecarbon hands out when asked to flush."""

    def __init__(self) -> None:
        self.data: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.data = total

    def live_out(self, total: Any, delta: Any) -> None:
        self.data = total


def _describe(hardware: Any) -> tuple[Component, Method, str]:
    """Component, method and note of one of codecarbon's hardware objects."""
    kind = type(hardware).__name__
    if kind == "GPU":
        return "gpu", "codecarbon_counter", "AMD SMI"
    if kind == "CPU":
        mode = hardware._mode
        if mode in _COUNTERS:
            return "cpu", "codecarbon_counter", _COUNTERS[mode]
        return "cpu", "codecarbon_model", f"thermal design power x {mode}"
    if kind in ("AppleSiliconChip", "Raspberry"):
        return hardware.chip_part.lower(), "codecarbon_counter", kind
    return "ram", "codecarbon_model", "watts per memory module"


def _is_nvidia(hardware: Any) -> bool:
    is_gpu = type(hardware).__name__ == "GPU"
    return is_gpu and any("nvidia" in type(device).__module__ for device in hardware.devices.devices)


def find_country(code: str) -> GridFactor:
    """The grid of a country by its three letters (ISO 3166-1 alpha-3), from codecarbon's offline table.

    Raises:
        ConfigError: On a country that the table lacks; codecarbon itself would take the world's mean.
    """
    table = DataSource().get_global_energy_mix_data()
    if code.upper() not in table:
        raise ConfigError(f"There is no CO2 figure for the country {code!r}; {_nearest(code, table)}")
    row = table[code.upper()]
    geography = GeoMetadata(country_iso_code=code.upper(), country_name=row["country_name"])
    kg = Emissions(DataSource()).get_country_emissions(Energy.from_energy(kWh=1.0), geography)
    year = f", {row['year']}" if "year" in row else ""
    return GridFactor(round(1000 * kg, 3), f"codecarbon {__version__}, {row['country_name']}{year}")


def _nearest(code: str, table: dict[str, Any]) -> str:
    by_name = {row["country_name"].lower(): key for key, row in table.items()}
    near = difflib.get_close_matches(code.lower(), by_name, n=1)
    if near:
        return f"did you mean {by_name[near[0]]}?"
    codes = difflib.get_close_matches(code.upper(), table, n=3)
    return f"did you mean {' or '.join(codes)}?" if codes else "expected three letters such as FRA or USA."
