from dataclasses import replace

import pytest

from hub_moe.energy import DEVICES, GridFactor, Rates, Workload, find_device, implied_utilisation, plan_cost
from hub_moe.energy.plan import Machinery, summarise_run
from hub_moe.errors import ConfigError

WORK = Workload(
    tokens=1e9,
    flops_per_token=3.6e9,
    attention_flops_per_token=1e9,
    context=4096,
    parameters=10**9,
    trained_parameters=10**8,
)
GPU = Machinery("mine", 1e12, "given", devices=4, watts=500.0, watts_source="given", memory_bytes=10**9)


def test_a_plan_is_this_arithmetic():
    plan = plan_cost(
        WORK, replace(GPU, pue=1.2), utilisation=(0.5, "stated"), grid=GridFactor(100.0, "given"), rates=Rates(2.0, 0.1)
    )
    assert plan.device_hours == 2000
    assert plan.wall_hours == 500
    assert plan.kwh == pytest.approx(1200)
    assert plan.co2_kg == pytest.approx(120)
    assert plan.usd == pytest.approx(4120)
    assert plan.state_bytes == (2 * 10**9 + 14 * 10**8) / 4
    assert plan.fits
    assert not replace(plan, machinery=replace(GPU, devices=3)).fits


def test_what_nobody_said_stays_empty():
    plan = plan_cost(WORK, Machinery("mine", 1e12, "given"), utilisation=(1.0, "stated"))
    assert (plan.kwh, plan.co2_kg, plan.usd, plan.fits) == (None, None, None, None)
    assert plan_cost(WORK, GPU, utilisation=(1.0, "stated")).usd is None


def test_hours_and_utilisation_say_the_same():
    share = implied_utilisation(WORK, device_hours=4000, peak_flops=1e12)
    assert share == 0.25
    assert plan_cost(WORK, GPU, utilisation=(share, "implied")).device_hours == 4000


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_utilisation_is_a_share(share):
    with pytest.raises(ConfigError, match="The utilisation is"):
        plan_cost(WORK, GPU, utilisation=(share, "stated"))


def test_hours_that_no_device_can_keep_are_refused():
    with pytest.raises(ConfigError, match="10 device hours are too few: at the full peak it takes 1000"):
        implied_utilisation(WORK, device_hours=10, peak_flops=1e12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace(WORK, tokens=-5),
        lambda: replace(WORK, tokens=float("inf")),
        lambda: replace(GPU, watts=0.0),
        lambda: replace(GPU, peak_flops=-1.0),
        lambda: replace(GPU, pue=0.9),
        lambda: implied_utilisation(WORK, device_hours=0, peak_flops=1e12),
    ],
)
def test_a_figure_that_cannot_be_is_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("h900", "did you mean h"), ("rtx-4090", None), ("H800", None), ("tpu-v5", "known are"), ("cpu", "--tflops")],
)
def test_a_device_is_found_by_name_or_the_nearest_are_named(name, hint):
    if hint is None:
        assert find_device(name) in DEVICES
    else:
        with pytest.raises(ConfigError) as error:
            find_device(name)
        assert hint in str(error.value)


def test_every_device_says_who_published_its_peak_and_8_bits_are_about_twice_as_fast():
    for device in DEVICES:
        assert device.source.startswith("NVIDIA ")
        assert device.fp8_flops is None or device.fp8_flops / device.bf16_flops == pytest.approx(2, rel=0.03)
    with pytest.raises(ConfigError, match="a100 has no FP8"):
        find_device("a100").peak_flops("fp8")


def test_the_utilisation_of_a_run_is_the_mean_over_its_time():
    fast = {"tokens": 100, "tokens_per_s": 100.0, "utilisation": 0.4, "peak_flops": 1e12, "peak_source": "measured: x"}
    slow = fast | {"tokens": 200, "tokens_per_s": 10.0, "utilisation": 0.04}
    held_out = {"step": 2, "eval_loss": 1.0}
    share, peak, source = summarise_run([fast, held_out, slow])
    assert share == pytest.approx((0.4 * 1 + 0.04 * 10) / 11)
    assert (peak, source) == (1e12, "measured: x")
    with pytest.raises(ConfigError, match="no row with a utilisation"):
        summarise_run([held_out])
