import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.energy import ComponentEnergy, EnergyReport, GridFactor, Rates, combine_reports, describe_energy
from hub_moe.errors import ConfigError

GPU = ComponentEnergy("gpu", "nvml_counter", 7200.0, 10.0, "board", "1 x H100")
CPU = ComponentEnergy("cpu", "rapl", 1800.0, 10.0)
CPU_ESTIMATE = ComponentEnergy("cpu", "codecarbon_model", 4320.0, 10.0)
RAM_ESTIMATE = ComponentEnergy("ram", "codecarbon_model", 200.0, 10.0, note="watts per memory module")
NO_CPU = ComponentEnergy("cpu", "none", None, 10.0, note="why")
NO_RAM = ComponentEnergy("ram", "none", None, 10.0)

components = st.one_of(
    st.builds(
        ComponentEnergy,
        component=st.sampled_from(["gpu", "cpu", "ram"]),
        method=st.sampled_from(["nvml_counter", "rapl", "codecarbon_counter", "codecarbon_model"]),
        joules=st.floats(0, 1e12),
        window_s=st.floats(0, 1e8),
        note=st.text(max_size=8).filter(lambda text: ";" not in text),
    ),
    st.builds(ComponentEnergy, st.sampled_from(["gpu", "cpu", "ram"]), st.just("none"), st.none(), st.floats(0, 1e8)),
)
reports = st.builds(
    EnergyReport,
    components=st.lists(components, max_size=5).map(tuple),
    window_s=st.floats(0, 1e8),
    tokens=st.none() | st.integers(0, 10**15),
    device_hours=st.none() | st.floats(0, 1e8),
)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((GPU, CPU), "2.50 Wh (measured)"),
        ((GPU, CPU_ESTIMATE, RAM_ESTIMATE), "3.26 Wh (estimate for cpu, ram)"),
        ((CPU_ESTIMATE, NO_RAM), "1.20 Wh (estimate for cpu; ram not measured)"),
        ((GPU, NO_CPU, NO_RAM), "2.00 Wh (measured for gpu; cpu, ram not measured)"),
        ((CPU, replace(NO_CPU, window_s=90.0)), "0.5 Wh (measured for cpu; cpu not measured for 90 s)"),
        ((NO_CPU, NO_RAM), "not measured"),
        ((), "not measured"),
    ],
)
def test_energy_is_told_in_words(parts, words):
    assert describe_energy(EnergyReport(parts, 10.0)) == words


def test_of_several_machines_one_is_metered_and_that_is_said():
    assert describe_energy(EnergyReport((GPU,), 10.0, num_machines=4)) == "2.00 Wh (measured, 1 of 4 machines)"


@pytest.mark.parametrize(
    ("joules", "words"), [(2, "2 J"), (36, "0.01 Wh"), (3.5996e6, "1.00 kWh"), (3.6e8, "100 kWh"), (9e12, "2.50 GWh")]
)
def test_energy_is_written_in_the_unit_that_fits(joules, words):
    assert describe_energy(EnergyReport((replace(CPU, joules=float(joules)),), 1.0)) == f"{words} (measured)"


def test_what_is_not_measured_is_none_in_every_figure():
    report = EnergyReport((NO_CPU,), 3600.0, tokens=10, grid=GridFactor(50, "given"), rates=Rates(usd_per_kwh=1))
    assert (report.joules, report.kwh, report.co2_g, report.usd, report.joules_per_1000_tokens) == (None,) * 5


def test_figures_follow_from_what_was_declared_and_from_nothing_else():
    bare = EnergyReport((GPU, CPU), 10.0)
    assert (bare.co2_g, bare.usd, bare.joules_per_1000_tokens) == (None, None, None)
    full = replace(bare, tokens=4500, device_hours=2.0, grid=GridFactor(56.0, "given"), rates=Rates(2.0, 0.5))
    assert full.joules_per_1000_tokens == 2000
    assert full.co2_g == pytest.approx(9000 / 3.6e6 * 56)
    assert full.usd == pytest.approx(4 + 9000 / 3.6e6 * 0.5)
    assert replace(full, device_hours=None).usd is None


def test_sessions_add_up_and_methods_stay_apart():
    first = EnergyReport((GPU, CPU, NO_RAM), 10.0, tokens=100, device_hours=1.0)
    second = EnergyReport(
        (replace(GPU, note="1 x H100; shared"), CPU_ESTIMATE, NO_RAM), 20.0, tokens=50, device_hours=2.0
    )
    both = combine_reports([first, second])
    assert [(each.component, each.method, each.joules, each.window_s) for each in both.components] == [
        ("gpu", "nvml_counter", 14400.0, 20.0),
        ("cpu", "rapl", 1800.0, 10.0),
        ("cpu", "codecarbon_model", 4320.0, 10.0),
        ("ram", "none", None, 20.0),
    ]
    assert both.components[0].note == "1 x H100; shared"
    assert (both.window_s, both.tokens, both.device_hours) == (30.0, 150, 3.0)
    assert both.label == "estimate for cpu; ram not measured"
    assert combine_reports([first, replace(second, tokens=None)]).tokens is None


@pytest.mark.parametrize("change", [{"grid": GridFactor(1, "given")}, {"rates": Rates(1.0)}])
def test_reports_of_different_terms_are_not_combined(change):
    report = EnergyReport((GPU,), 10.0)
    with pytest.raises(ConfigError, match=f"different {next(iter(change))}"):
        combine_reports([report, replace(report, **change)])
    with pytest.raises(ConfigError, match="no energy reports"):
        combine_reports([])


@given(st.lists(reports, min_size=1, max_size=4))
def test_combining_loses_and_invents_nothing(parts):
    both = combine_reports(parts)
    known = [each.joules for part in parts for each in part.components if each.joules is not None]
    assert both.joules == (pytest.approx(sum(known)) if known else None)
    assert sum(each.window_s for each in both.components) == pytest.approx(
        sum(each.window_s for part in parts for each in part.components)
    )


@given(reports)
def test_a_report_is_the_same_after_json(report):
    assert EnergyReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def _edited(**changes):
    report = EnergyReport(
        (GPU, CPU), 10.0, tokens=5, grid=GridFactor(56.0, "given"), rates=Rates(1.0), device_hours=1.0
    )
    return json.loads(json.dumps(report.to_dict())) | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_edited(joules=1.0), "joules 1.0, but its parts give 9000.0; it was edited"),
        (_edited(label="estimate"), "label 'estimate', but"),
        (_edited(usd=None), "usd None, but"),
        (_edited(jules=1), "no key 'jules'; did you mean joules"),
        (_edited(window_s="long"), "window_s must be a number"),
        (_edited(window_s=-1), "window_s is -1"),
        (_edited(num_machines=0), "num_machines 0; expected 1 or more"),
        (_edited(format_version=2), "has format 2"),
        (_edited(grid={"g_per_kwh": -1, "source": ""}), "g CO2 per kWh is -1"),
        (_edited(rates={"usd_per_hour": -2}), "USD per device hour is -2"),
        ([], "must be a table"),
        ({}, "lacks the key components"),
    ],
)
def test_a_report_that_does_not_hold_together_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        EnergyReport.from_dict(data)


@pytest.mark.parametrize(
    ("method", "joules"),
    [("none", 0.0), ("rapl", None), ("rapl", -1.0), ("rapl", float("nan")), ("rapl", float("inf"))],
)
def test_a_component_is_measured_with_a_figure_or_not_measured_without(method, joules):
    with pytest.raises(ConfigError, match="The energy of cpu"):
        ComponentEnergy("cpu", method, joules, 1.0)


def test_the_grid_of_a_country_is_codecarbons_and_says_so():
    pytest.importorskip("codecarbon")
    from hub_moe.energy.codecarbon_model import find_country

    france, poland = find_country("fra"), find_country("POL")
    assert 0 < france.g_per_kwh < 100 < poland.g_per_kwh
    assert france.source.startswith("codecarbon ")
    assert "France, 20" in france.source


@pytest.mark.parametrize(
    ("code", "hint"), [("France", "did you mean FRA?"), ("FRAA", "FRA"), ("0", "expected three letters"), ("", "three")]
)
def test_a_country_without_a_figure_is_an_error_and_never_the_worlds_mean(code, hint):
    pytest.importorskip("codecarbon")
    from hub_moe.energy.codecarbon_model import find_country

    with pytest.raises(ConfigError, match="no CO2 figure for the country") as error:
        find_country(code)
    assert hint in str(error.value)
