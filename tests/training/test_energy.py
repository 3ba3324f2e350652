import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("codecarbon")

from hub_moe.training.energy import EnergyMeter, EnergyReading


@pytest.fixture
def no_network(monkeypatch):
    def refuse(_socket, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_meter_adds_up_labels_its_parts_and_leaves_nothing(no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads_before = set(threading.enumerate())
    meter = EnergyMeter()
    first = meter.read()
    sum(number * number for number in range(3_000_000))
    last = meter.stop()
    assert last.kwh > first.kwh >= 0
    assert last.kwh == pytest.approx(sum(last.parts.values()))
    assert last.seconds > first.seconds
    assert {"cpu", "ram"} <= set(last.sources)
    assert all(source.startswith(("measured (", "estimated (")) for source in last.sources.values())
    assert last.sources["ram"].startswith("estimated")
    assert list(tmp_path.iterdir()) == []
    assert all(thread.daemon for thread in set(threading.enumerate()) - threads_before)


def test_an_estimate_is_never_called_measured():
    def label(**sources):
        return EnergyReading(0.0, 0.0, dict.fromkeys(sources, 0.0), sources).label

    assert label(cpu="measured (RAPL)", gpu="measured (NVML)") == "measured"
    assert label(cpu="measured (RAPL)", ram="estimated (watts per module)") == "estimated for ram"
    assert label(cpu="estimated (TDP x cpu_load)", ram="estimated (watts per module)") == "estimated"


def test_rows_carry_the_energy_so_far_over_a_resume(tiny_config, tmp_path, no_network):
    from hub_moe.modeling import HubMoeForCausalLM
    from hub_moe.training import read_metrics

    from .test_metrics import _StopAt, _train

    options = {"steps": 4, "save_strategy": "steps", "save_steps": 2, "with_energy": True}
    _train(HubMoeForCausalLM(tiny_config), tmp_path, _StopAt(2), **options)
    metrics, _ = _train(HubMoeForCausalLM(tiny_config), tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    energies = [row["energy_kwh"] for row in rows]
    assert len(energies) == 4
    assert energies == sorted(energies)
    assert metrics.energy_kwh >= energies[-1] > 0
    assert all(row["energy_source"].startswith(("measured", "estimated")) for row in rows)


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
    assert run.stdout == "Measuring energy needs codecarbon: pip install 'hub_moe[train]'.\n"
