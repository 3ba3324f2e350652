import os
import socket
import subprocess
import sys
import threading

import pytest

from hub_moe.energy import EnergyMeter, prepare_metering
from hub_moe.energy.counters import NvmlCounter, _visible_boards, find_gpus, find_rapl


@pytest.fixture
def no_network(monkeypatch):
    def refuse(_socket, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _zone(powercap, name, title, energy_uj=0, range_uj=1_000_000):
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{title}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


@pytest.fixture
def server(tmp_path):
    """A machine with two packages, cores, memory, and a package shown twice: the files of its counters by zone."""
    zones = {
        "intel-rapl:0": ("package-0", 100),
        "intel-rapl:0:0": ("core", 0),
        "intel-rapl:0:1": ("dram", 0),
        "intel-rapl:1": ("package-1", 0),
        "intel-rapl:1:0": ("dram", 0),
        "intel-rapl:2": ("psys", 0),
        "intel-rapl-mmio:0": ("package-0", 100),
    }
    (tmp_path / "intel-rapl").mkdir()  # the control type, which is no zone
    return tmp_path, {name: _zone(tmp_path, name, *zone) for name, zone in zones.items()}


def _meter(powercap, estimates="never", **options):
    return EnergyMeter(estimates=estimates, powercap=powercap, device_files=powercap, **options)


def test_packages_and_memory_are_read_once_each_and_nothing_else(server):
    powercap, files = server
    with _meter(powercap) as meter:
        for name, energy_uj in (("intel-rapl:0", 400_100), ("intel-rapl:1", 600_000), ("intel-rapl:0:1", 250_000)):
            files[name].write_text(str(energy_uj))
        for name in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
            files[name].write_text("900000")
        report = meter.stop()
    assert [(each.component, each.method, each.joules) for each in report.components] == [
        ("cpu", "rapl", 1.0),
        ("ram", "rapl", 0.25),
    ]
    assert report.label == "measured"
    assert report.components[0].note == "packages: 2"


def test_a_machine_that_shows_its_packages_by_one_interface_only_is_read_too(tmp_path):
    file = _zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    counter = find_rapl("cpu", tmp_path)
    file.write_text("500000")
    assert counter.stop().joules == 0.5


def test_a_counter_that_starts_again_at_0_goes_on_counting(tmp_path):
    file = _zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=900_000)
    counter = find_rapl("cpu", tmp_path)
    for energy_uj, joules in ((100_000, 0.2), (50_000, 1.15), (60_000, 1.16)):
        file.write_text(str(energy_uj))
        assert counter.read().joules == pytest.approx(joules)
    counter.stop()


def test_the_thread_reads_a_counter_before_it_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr("hub_moe.energy.counters._SAMPLE_EVERY_S", 0.01)
    file = _zone(tmp_path, "intel-rapl:0", "package-0")
    counter = find_rapl("cpu", tmp_path)
    [zone] = counter._zones
    for energy_uj in (800_000, 700_000):  # more than one round, which two readings alone cannot tell
        whole = file.with_suffix(".new")  # a counter is never seen empty, as a file that is being written is
        whole.write_text(str(energy_uj))
        whole.replace(file)
        for _ in range(1000):
            if zone.last_uj == energy_uj:
                break
            counter._stopped.wait(0.01)
    assert counter.stop().joules == pytest.approx(1.7)
    assert not counter._thread.is_alive()


def test_a_counter_that_goes_away_leaves_no_figure(server):
    powercap, files = server
    meter = _meter(powercap)
    files["intel-rapl:1"].unlink()
    report = meter.stop()
    assert (report.components[0].method, report.components[0].joules) == ("none", None)
    assert "no longer" in report.components[0].note
    assert report.label == "measured for ram; cpu not measured"


@pytest.mark.parametrize("broken", ["", "a lot", "12 34"])
def test_a_counter_without_a_number_is_not_measured(tmp_path, broken):
    _zone(tmp_path, "intel-rapl:0", "package-0", energy_uj=broken)
    assert find_rapl("cpu", tmp_path).joules is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_counter_for_root_alone_says_so(tmp_path):
    _zone(tmp_path, "intel-rapl:0", "package-0").chmod(0)
    report = _meter(tmp_path).stop()
    assert report.components[0].note == "RAPL is there, and only root may read it"
    assert report.label == "not measured"


def test_nothing_to_measure_by_is_not_measured_and_never_0(tmp_path):
    report = _meter(tmp_path).stop()
    assert [(each.component, each.joules) for each in report.components] == [("cpu", None), ("ram", None)]
    assert (report.joules, report.kwh, report.label) == (None, None, "not measured")


def test_a_gpu_that_nothing_can_read_is_named_and_a_missing_one_is_not(tmp_path):
    (tmp_path / "nvidiactl").touch()
    program = (
        "import sys; sys.modules['pynvml'] = None\n"
        "from pathlib import Path\n"
        "from hub_moe.energy import EnergyMeter\n"
        f"report = EnergyMeter(estimates='never', powercap=Path({str(tmp_path)!r}), "
        f"device_files=Path({str(tmp_path)!r})).stop()\n"
        "print(report.components[0].component, report.components[0].note)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "gpu needs nvidia-ml-py: pip install 'hub_moe[train]'\n"
    (tmp_path / "nvidiactl").unlink()
    assert find_gpus({}, tmp_path) is None or isinstance(find_gpus({}, tmp_path), NvmlCounter)


class _Driver:
    """Answers NVML's calls for boards of some names, as nvidia-ml-py does; a handle is a board's index."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, *names, split=()):
        self.names, self.split, self.used_mj, self.is_gone = names, split, [10_000] * len(names), False

    def nvmlDeviceGetCount(self):
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}f0e"

    def nvmlDeviceGetMigMode(self, handle):
        if "A100" not in self.names[handle]:
            raise self.NVMLError_NotSupported
        return [int(handle in self.split), 0]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.is_gone:
            raise self.NVMLError("GPU is lost")
        return self.used_mj[handle]

    def nvmlShutdown(self):
        self.is_gone = True


def test_boards_add_up_from_the_start_of_metering():
    driver = _Driver("H100", "H100")
    counter = NvmlCounter(driver, *_visible_boards(driver, None))
    driver.used_mj = [12_000, 11_500]
    energy = counter.stop()
    assert (energy.joules, energy.scope, energy.note) == (3.5, "board", "2 x H100")
    assert driver.is_gone


@pytest.mark.parametrize("event", ["lost", "reset"])
def test_a_board_that_is_lost_or_whose_driver_was_loaded_again_leaves_no_figure(event):
    driver = _Driver("H100")
    counter = NvmlCounter(driver, *_visible_boards(driver, None))
    driver.is_gone, driver.used_mj = event == "lost", [5]
    assert (counter.read().method, counter.read().joules) == ("none", None)


@pytest.mark.parametrize(
    ("names", "visible", "expected", "note"),
    [
        (("H100",) * 3, "2,0", [2, 0], "2 x H100"),
        (("H100",) * 3, "GPU-1f", [1], "1 x H100"),
        (("H100",) * 3, "", [], "0 x "),
        (("H100",) * 3, "7", [], "0 x "),
        (("T4", "H100"), "0", [0, 1], "2 x H100, T4; all boards of the machine, as CUDA_VISIBLE_DEVICES=0 "),
        (("A100", "A100"), "MIG-7", [0, 1], "2 x A100; all boards of the machine"),
    ],
)
def test_the_boards_that_cuda_sees_are_metered_or_all_where_that_is_unclear(names, visible, expected, note):
    handles, told = _visible_boards(_Driver(*names), visible)
    assert handles == expected
    assert told.startswith(note)


def test_a_split_board_is_told():
    _, note = _visible_boards(_Driver("A100", "A100", split=(1,)), None)
    assert note == "2 x A100; a board is split by MIG: its other slices count too"


@pytest.mark.gpu
def test_the_boards_counter_goes_up_while_a_gpu_works():
    import torch

    counter = find_gpus()
    first = counter.read()
    left = torch.ones(4096, 4096, device="cuda")
    for _ in range(200):
        left = (left @ left).clamp(max=1.0)
    torch.cuda.synchronize()
    last = counter.stop()
    assert (first.method, last.method, last.scope) == ("nvml_counter", "nvml_counter", "board")
    assert last.joules > first.joules >= 0
    assert last.joules / last.window_s < 2000 * torch.cuda.device_count()
    assert torch.cuda.get_device_name(0).removeprefix("NVIDIA ") in last.note


@pytest.mark.gpu
def test_only_visible_boards_are_counted():
    everything, none = find_gpus({}), find_gpus({"CUDA_VISIBLE_DEVICES": ""})
    first = find_gpus({"CUDA_VISIBLE_DEVICES": "0"})
    assert none is None
    assert len(first._handles) == 1 <= len(everything._handles)


def test_codecarbon_fills_the_gaps_says_so_and_leaves_nothing(no_network, tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)
    threads_before = set(threading.enumerate())
    powercap = tmp_path / "powercap"
    file = _zone(powercap, "intel-rapl:0", "package-0")
    meter = _meter(powercap, "required")
    first = meter.read()
    sum(number * number for number in range(3_000_000))
    file.write_text("500000")
    last = meter.stop()
    cpu, ram = last.components
    assert (cpu.method, cpu.joules) == ("rapl", 0.5)
    assert (ram.method, ram.note) == ("codecarbon_model", "watts per memory module")
    assert ram.joules > first.components[1].joules >= 0
    assert last.joules == cpu.joules + ram.joules
    assert last.label == "estimate for ram"
    assert meter.read() == meter.stop() == last
    assert [path.name for path in tmp_path.iterdir()] == ["powercap"]
    assert all(thread.daemon for thread in set(threading.enumerate()) - threads_before)


def test_a_machine_without_counters_is_estimated(no_network, tmp_path):
    pytest.importorskip("codecarbon")
    report = _meter(tmp_path, "if installed").stop()
    assert [each.component for each in report.components][-2:] == ["cpu", "ram"]
    assert all(each.method.startswith("codecarbon_") for each in report.components[-2:])
    assert "estimate for" in report.label
    assert report.joules > 0


def test_codecarbon_is_not_started_where_counters_tell_all(server):
    powercap, _ = server
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from hub_moe.energy import EnergyMeter\n"
        f"EnergyMeter(powercap=Path({str(powercap)!r}), device_files=Path({str(powercap)!r})).stop()\n"
        "print('codecarbon' in sys.modules, 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_without_codecarbon_the_report_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['codecarbon'] = None\n"
        "from pathlib import Path\n"
        "from hub_moe.energy import EnergyMeter\n"
        f"report = EnergyMeter(powercap=Path({str(tmp_path)!r}), device_files=Path({str(tmp_path)!r})).stop()\n"
        "print(report.label)\n"
        "print(report.components[-1].note)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        run.stdout
        == "not measured\nEstimating energy or a country's CO2 needs codecarbon: pip install 'hub_moe[train]'.\n"
    )


def test_without_codecarbon_asking_for_energy_is_an_error_that_says_what_to_install():
    program = (
        "import sys; sys.modules['codecarbon'] = None\n"
        "from hub_moe.errors import MissingExtraError\n"
        "from hub_moe.training import RunMetrics\n"
        "RunMetrics('metrics.jsonl')\n"
        "try:\n    RunMetrics('metrics.jsonl', with_energy=True)\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "Estimating energy or a country's CO2 needs codecarbon: pip install 'hub_moe[train]'.\n"


def test_rows_carry_the_energy_so_far_over_a_resume(tiny_config, tmp_path, no_network):
    pytest.importorskip("codecarbon")
    from hub_moe.modeling import HubMoeForCausalLM
    from hub_moe.training import read_metrics

    from ..training.test_metrics import _StopAt, _train

    options = {"steps": 4, "save_strategy": "steps", "save_steps": 2, "with_energy": True}
    stopped, _ = _train(HubMoeForCausalLM(tiny_config), tmp_path, _StopAt(2), **options)
    metrics, _ = _train(HubMoeForCausalLM(tiny_config), tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    energies = [row["energy_kwh"] for row in rows]
    assert len(energies) == 4
    assert energies == sorted(energies)
    assert metrics.energy.kwh >= energies[-1] > 0
    assert (stopped.energy.tokens, metrics.energy.tokens) == (32, 64)
    assert metrics.energy.device_hours == pytest.approx(metrics.energy.window_s / 3600)
    assert all(row["energy_source"].startswith(("measured", "estimate")) for row in rows)


def test_a_run_that_is_not_metered_has_no_energy(tiny_model, tmp_path):
    from ..training.test_metrics import _train

    metrics, _ = _train(tiny_model, tmp_path, steps=1)
    assert metrics.energy is None


def test_a_meter_that_was_prepared_reports_as_any_other():
    def facts(report):
        return [(each.component, each.method, each.note) for each in report.components]

    expected = facts(EnergyMeter().stop())
    prepare_metering()
    assert facts(EnergyMeter().stop()) == expected


def test_a_process_that_ends_while_metering_is_prepared_says_nothing():
    code = "from hub_moe.energy import prepare_metering; prepare_metering()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
