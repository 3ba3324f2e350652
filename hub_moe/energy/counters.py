"""Energy counters of the hardware: NVML of NVIDIA GPUs, RAPL of processors."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from .report import ComponentEnergy

POWERCAP = Path("/sys/class/powercap")
DEVICE_FILES = Path("/dev")
# A RAPL counter starts again after 65 kJ or more: at 500 W after two minutes.
_SAMPLE_EVERY_S = 30.0
_INSTALL = "pip install 'hub_moe[train]'"
_LOST = "its counter can no longer be read, or was reset, so the figure is void"


class Counter(Protocol):
    """Something whose energy since its making can be read at any time."""

    def read(self) -> ComponentEnergy:
        """Energy since the start; method `none` where the counter was lost on the way."""

    def stop(self) -> ComponentEnergy:
        """The final figure; the hardware is let go."""


@dataclass
class _Zone:
    """A counter of RAPL in microjoules, which starts at 0 again after `range_uj`."""

    folder: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def sample(self) -> None:
        now_uj = int((self.folder / "energy_uj").read_text())
        self.total_uj += now_uj - self.last_uj + (self.range_uj if now_uj < self.last_uj else 0)
        self.last_uj = now_uj


class RaplCounter:
    """Energy of all processors, or all memory, of the machine; a thread reads it before it starts again at 0."""

    def __init__(self, component: Literal["cpu", "ram"], folders: Sequence[Path]) -> None:
        self.component = component
        self._zones = [_open_zone(folder) for folder in folders]
        self._started_s = time.monotonic()
        self._is_lost = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="hub_moe RAPL", daemon=True)
        self._thread.start()

    def read(self) -> ComponentEnergy:
        """Energy since the start."""
        self._sample()
        window_s = time.monotonic() - self._started_s
        if self._is_lost:
            return ComponentEnergy(self.component, "none", None, window_s, note=f"RAPL: {_LOST}")
        joules = sum(zone.total_uj for zone in self._zones) / 1e6
        what = "packages" if self.component == "cpu" else "DRAM"
        return ComponentEnergy(self.component, "rapl", joules, window_s, note=f"{what}: {len(self._zones)}")

    def stop(self) -> ComponentEnergy:
        """The final figure; ends the thread."""
        self._stopped.set()
        self._thread.join()
        return self.read()

    def _sample(self) -> None:
        with self._lock:
            try:
                for zone in self._zones:
                    zone.sample()
            except (OSError, ValueError):
                self._is_lost = True

    def _sample_on(self) -> None:
        while not self._stopped.wait(_SAMPLE_EVERY_S):
            self._sample()


def find_rapl(component: Literal["cpu", "ram"], powercap: Path = POWERCAP) -> RaplCounter | ComponentEnergy | None:
    """The RAPL counter of a component; why there is none, where it may not be read; None where the machine has none."""
    wanted = "package-" if component == "cpu" else "dram"
    zones = [folder for folder in sorted(powercap.glob("*rapl*:*")) if _name_of(folder).startswith(wanted)]
    # some machines show the same package once more through another interface
    zones = [zone for zone in zones if "mmio" not in zone.name] or zones
    if not zones:
        return None
    try:
        return RaplCounter(component, zones)
    except PermissionError:
        return ComponentEnergy(component, "none", None, 0.0, note="RAPL is there, and only root may read it")
    except (OSError, ValueError) as error:
        return ComponentEnergy(component, "none", None, 0.0, note=f"RAPL is there and cannot be read: {error}")


def _open_zone(folder: Path) -> _Zone:
    range_uj, energy_uj = (int((folder / name).read_text()) for name in ("max_energy_range_uj", "energy_uj"))
    return _Zone(folder, range_uj, energy_uj)


def _name_of(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


class NvmlCounter:
    """Energy of NVIDIA boards, by `nvmlDeviceGetTotalEnergyConsumption`: millijoules since the driver was loaded.

    Only the board: no host, no power supply. On a shared board, or a MIG slice of it, everybody's work counts.
    """

    def __init__(self, nvml: Any, handles: Sequence[Any], note: str) -> None:
        self._nvml, self._handles, self._note = nvml, handles, note
        self._first_mj = self._read_mj()
        self._started_s = time.monotonic()

    def read(self) -> ComponentEnergy:
        """Energy since the start."""
        window_s = time.monotonic() - self._started_s
        try:
            used_mj = [now - first for now, first in zip(self._read_mj(), self._first_mj, strict=True)]
        except self._nvml.NVMLError:
            used_mj = [-1]
        if min(used_mj) < 0:
            return ComponentEnergy("gpu", "none", None, window_s, "board", f"NVML: {_LOST}")
        return ComponentEnergy("gpu", "nvml_counter", sum(used_mj) / 1e3, window_s, "board", self._note)

    def stop(self) -> ComponentEnergy:
        """The final figure; closes NVML."""
        final = self.read()
        self._nvml.nvmlShutdown()
        return final

    def _read_mj(self) -> list[int]:
        return [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self._handles]


def find_gpus(
    environment: Mapping[str, str] = os.environ, device_files: Path = DEVICE_FILES
) -> NvmlCounter | ComponentEnergy | None:
    """The counter of the NVIDIA boards that CUDA_VISIBLE_DEVICES shows; why there is none; None without a board."""
    has_device_file = (device_files / "nvidiactl").exists()
    try:
        import pynvml
    except ImportError:
        return _no_gpu(f"needs nvidia-ml-py: {_INSTALL}") if has_device_file else None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _no_gpu(f"NVML cannot start: {error}") if has_device_file else None
    try:
        handles, note = _visible_boards(pynvml, environment.get("CUDA_VISIBLE_DEVICES"))
        if handles:
            return NvmlCounter(pynvml, handles, note)
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        return _no_gpu(f"NVML has no energy counter here: {error}")
    pynvml.nvmlShutdown()
    return None


def _no_gpu(reason: str) -> ComponentEnergy:
    return ComponentEnergy("gpu", "none", None, 0.0, "board", reason)


def _visible_boards(nvml: Any, visible: str | None) -> tuple[list[Any], str]:
    """Handles of boards, and a note on what they are.

    CUDA numbers boards by speed and NVML by PCI bus, so that a number means the same board only where all are alike.
    """
    everything = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    words = None if visible is None else [word.strip() for word in visible.split(",") if word.strip()]
    names = {_text(nvml.nvmlDeviceGetName(handle)) for handle in everything}
    caveats = []
    if words is None:
        chosen = everything
    elif all(word.isdigit() for word in words) and len(names) <= 1:
        chosen = [everything[int(word)] for word in words if int(word) < len(everything)]
    elif all(word.startswith("GPU-") for word in words):
        uuids = {_text(nvml.nvmlDeviceGetUUID(handle)): handle for handle in everything}
        chosen = [handle for uuid, handle in uuids.items() if uuid.startswith(tuple(words))]
    else:
        chosen = everything
        caveats.append(f"all boards of the machine, as CUDA_VISIBLE_DEVICES={visible} does not tell which")
    if any(_is_split(nvml, handle) for handle in chosen):
        caveats.append("a board is split by MIG: its other slices count too")
    names = {_text(nvml.nvmlDeviceGetName(handle)) for handle in chosen}
    return chosen, "; ".join([f"{len(chosen)} x {', '.join(sorted(names))}", *caveats])


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError_NotSupported:
        return False


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
