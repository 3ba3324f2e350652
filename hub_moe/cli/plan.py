"""`hub-moe plan`: what a training run will take, before it starts."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .inspect import measure_model
from .output import describe_bytes, describe_count, describe_flops, print_json, print_table, print_text

if TYPE_CHECKING:
    from ..energy import CostPlan, GridFactor, Workload
    from ..energy.devices import Precision as PeakPrecision
    from ..energy.plan import Machinery

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_NOTES = """\
operations   2 x weights forward, 2 more where a gradient passes back, 2 more where
             a weight is trained; attention to the whole context, no discount for
             the causal mask; what checkpointing computes again is not counted.
estimate     everything but the operations; energy is watts x hours of the devices
             alone, without hosts and network.
state        bf16 weights; of trained ones also bf16 gradients, float32 weights and
             AdamW's moments (arXiv:1910.02054, section 3.1), shared out evenly.
             Activations come on top: that it fits is needed, not yet enough."""


class Method(StrEnum):
    """What is trained."""

    full = "full"
    experts = "experts"
    lora = "lora"


class Precision(StrEnum):
    """Of the matrix products."""

    bf16 = "bf16"
    fp8 = "fp8"


def parse_amount(text: str) -> float:
    """The number in `14.8T`, `300B`, `2.664M`, `1e9` or `5000`."""
    match = re.fullmatch(r"([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)\s*([KMBT]?)", text.strip(), flags=re.IGNORECASE)
    if not match:
        raise typer.BadParameter(f"{text!r} is not an amount such as 300B, 14.8T or 1e9.")
    return float(match.group(1)) * _UNITS[match.group(2).upper()]


def plan(  # noqa: PLR0913 (a parameter is a flag)
    model: Annotated[str, typer.Argument(metavar="REPO_OR_PATH_OR_PRESET", help="Hub id, folder or preset name.")],
    tokens: Annotated[float, typer.Option(parser=parse_amount, metavar="N", help="To train on: 300B, 14.8T.")],
    method: Annotated[Method, typer.Option(help="What is trained.")] = Method.full,
    expert_share: Annotated[
        float, typer.Option(help="experts: share of the routed work that trained experts do, ESFT's top_p.")
    ] = 0.2,
    rank: Annotated[int, typer.Option(min=1, help="lora: rank of the adapters at the attention's projections.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence.", show_default="4096, or the model's limit if lower"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="h800, h100, h200, a100, l40s, rtx4090, ...")] = None,
    tflops: Annotated[float | None, typer.Option(help="Dense peak of one device, instead of --device.")] = None,
    precision: Annotated[Precision, typer.Option(help="Whose peak of the device counts.")] = Precision.bf16,
    devices: Annotated[int, typer.Option(min=1, help="How many work together.")] = 1,
    utilisation: Annotated[float | None, typer.Option(help="Share of the peak that you expect: 0.35.")] = None,
    device_hours: Annotated[
        float | None, typer.Option(parser=parse_amount, metavar="N", help="Known hours, to see what they imply.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN_FOLDER", help="Take utilisation, and watts if metered, of a run.")
    ] = None,
    watts: Annotated[float | None, typer.Option(help="Of one device.", show_default="the data sheet's limit")] = None,
    pue: Annotated[float | None, typer.Option(help="The building's energy for a joule of the devices: 1.1.")] = None,
    usd_per_hour: Annotated[float | None, typer.Option(help="What a device hour costs you.")] = None,
    usd_per_kwh: Annotated[float | None, typer.Option(help="What a kWh costs you.")] = None,
    country: Annotated[str | None, typer.Option(help="Where, for the CO2: FRA, USA, CHN.")] = None,
    g_per_kwh: Annotated[float | None, typer.Option(help="The grid's g CO2 per kWh, instead of --country.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact numbers as JSON.")] = False,
) -> None:
    """Say what a training run will take: operations, device hours, energy, CO2, cost, memory.

    Reads config.json only, as `hub-moe inspect` does. Peaks are the makers' dense figures; prices and utilisation are
    never assumed: give --utilisation, a run that --measured it, or --device-hours to see which utilisation they imply.
    DeepSeek-V3's published hours (the first example) imply 45.4 % of the H800's BF16 peak, 22.7 % of its FP8 peak.

    \b
    Examples:
      hub-moe plan deepseek-v3 --tokens 14.8T --device h800 --devices 2048 --device-hours 2.664M \\
        --usd-per-hour 2
      hub-moe plan deepseek-v2-lite --tokens 10M --method experts --device rtx4090 --utilisation 0.2
      hub-moe plan tiny --tokens 1B --measured runs/demo/base --country FRA
    """
    from ..energy import Rates, Workload, plan_cost

    rates, grid = Rates(usd_per_hour, usd_per_kwh), _find_grid(country, g_per_kwh)
    _check(expert_share, [utilisation, device_hours, measured])
    run = _read_run(measured) if measured else None
    machinery = replace(
        _find_machinery(run, device, tflops, precision=precision.value), devices=devices, pue=pue, **_given_watts(watts)
    )
    config, footprint = measure_model(model, revision)
    from ..training.flops import plan_training_cost

    planned = plan_training_cost(footprint, config, method.value, expert_share=expert_share, rank=rank)
    context = context or min(4096, footprint.max_context or 4096)
    per_token = planned.cost.flops_per_token(context)
    workload = Workload(
        tokens=tokens,
        flops_per_token=per_token,
        attention_flops_per_token=per_token - planned.cost.flops_per_token(0),
        context=context,
        parameters=planned.parameters,
        trained_parameters=planned.trained_parameters,
    )
    share = _find_utilisation(workload, machinery, run, utilisation=utilisation, device_hours=device_hours)
    facts = {"model": model, "method": method.value, "mtp_trained": planned.runs_mtp}
    facts |= _make_facts(plan_cost(workload, machinery, utilisation=share, grid=grid, rates=rates), device)
    print_json(facts) if as_json else _print_facts(facts)


@dataclass(frozen=True)
class _Run:
    """What a run folder tells: peak and watts are of one device, None where it does not say."""

    name: str
    utilisation: float
    peak_flops: float | None
    peak_source: str
    watts: float | None
    watts_source: str


def _read_run(folder: Path) -> _Run:
    from ..energy import EnergyReport
    from ..energy.plan import summarise_run
    from ..files.json_files import read_json
    from ..training import read_metrics

    if not folder.is_dir():
        raise ConfigError(f"There is no run folder {folder}; --measured takes one that hub-moe train wrote.")
    utilisation, peak_flops, source = summarise_run(read_metrics(folder / "metrics.jsonl"))
    file = folder / "report.json"
    report = read_json(file, "the report of a run") if file.exists() else {}
    processes = report.get("processes")
    watts, watts_source = None, ""
    if processes and report.get("energy"):
        energy = EnergyReport.from_dict(report["energy"], where=f"The energy in {file}")
        watts_source = f"{folder}: {energy.label}"
        if energy.joules is not None and energy.window_s:
            watts = energy.joules / energy.window_s * energy.num_machines / processes
    return _Run(str(folder), utilisation, processes and peak_flops / processes, source, watts, watts_source)


def _find_machinery(
    run: _Run | None, device: str | None, tflops: float | None, *, precision: "PeakPrecision"
) -> "Machinery":
    from ..energy import find_device
    from ..energy.plan import Machinery

    if device is not None and tflops is not None:
        raise ConfigError("--device and --tflops both say how fast a device is; give one of them.")
    if run is not None and precision != "bf16":
        raise ConfigError("A run's utilisation is of the BF16 peak; leave --precision out, or give --utilisation.")
    if tflops is not None:
        return Machinery(f"{tflops:g} TFLOPS", tflops * 1e12, "given", precision)
    if device is not None:
        found = find_device(device)
        limits = (found.watts, f"most that the board draws, {found.source}")
        if run is not None and run.watts is not None and run.peak_source == f"published: {found.source}":
            limits = (run.watts, run.watts_source)
        return Machinery(
            name=found.name,
            peak_flops=found.peak_flops(precision),
            peak_source=found.source,
            precision=precision,
            watts=limits[0],
            watts_source=limits[1],
            memory_bytes=found.memory_bytes,
        )
    if run is not None and run.peak_flops:
        name = f"device of {run.name}"
        return Machinery(name, run.peak_flops, run.peak_source, watts=run.watts, watts_source=run.watts_source)
    if run is not None:
        raise ConfigError(f"{run.name} has no report.json yet, so it does not say on how many devices; give --device.")
    raise ConfigError("Say on what the model is trained: --device, --tflops, or --measured with a run of yours.")


def _find_utilisation(
    workload: "Workload",
    machinery: "Machinery",
    run: _Run | None,
    *,
    utilisation: float | None,
    device_hours: float | None,
) -> tuple[float, str]:
    from ..energy import implied_utilisation

    if utilisation is not None:
        return utilisation, "stated"
    if run is not None:
        return run.utilisation, f"measured: {run.name}, of {run.peak_source}"
    assert device_hours is not None  # _check saw to it
    share = implied_utilisation(workload, device_hours=device_hours, peak_flops=machinery.peak_flops)
    return share, "implied by the hours given"


def _find_grid(country: str | None, g_per_kwh: float | None) -> "GridFactor | None":
    from ..energy import GridFactor

    if country is not None and g_per_kwh is not None:
        raise ConfigError("--country and --g-per-kwh both say what a kWh emits; give one of them.")
    if g_per_kwh is not None:
        return GridFactor(g_per_kwh, "given")
    if country is None:
        return None
    from ..energy.codecarbon_model import find_country

    return find_country(country)


def _given_watts(watts: float | None) -> dict[str, Any]:
    return {} if watts is None else {"watts": watts, "watts_source": "given"}


def _check(expert_share: float, sources: list[Any]) -> None:
    if not 0 < expert_share <= 1:
        raise ConfigError(f"--expert-share is {expert_share:g}; expected a share above 0 and at most 1.")
    if sum(source is not None for source in sources) != 1:
        raise ConfigError("Give one of --utilisation, --device-hours and --measured: nothing is assumed here.")


def _make_facts(plan: "CostPlan", device: str | None) -> dict[str, Any]:
    """What is printed; of a known device the utilisation of each of its peaks."""
    from ..energy import find_device

    facts = plan.to_dict()
    reached = plan.utilisation * plan.machinery.peak_flops
    peaks: dict[str, float] = {plan.machinery.precision: plan.machinery.peak_flops}
    if device is not None:
        found = find_device(device)
        peaks = {"bf16": found.bf16_flops} | ({"fp8": found.fp8_flops} if found.fp8_flops else {})
    return facts | {"utilisation_of": {name: reached / peak for name, peak in peaks.items()}}


def _print_facts(facts: dict[str, Any]) -> None:
    work, machines = facts["workload"], facts["machinery"]
    shares = facts["utilisation_of"]
    if facts["utilisation_source"] == "stated":
        shares = {machines["precision"]: facts["utilisation"]}
    mtp = ", MTP included" if facts["mtp_trained"] else ""
    print_text(f"{facts['model']}, method {facts['method']}{mtp}, {describe_count(work['tokens'])} tokens")
    print_text(f"on {machines['devices']:,} x {machines['name']}: peak {machines['peak_source']}.\n")
    rows = [
        ("operations for a token", describe_flops(work["flops_per_token"])),
        (f"- of them attention to {work['context']:,} tokens", describe_flops(work["attention_flops_per_token"])),
        ("operations", f"{facts['flops']:.4g} FLOP"),
        *((f"utilisation of the {name.upper()} peak", f"{100 * share:.1f} %") for name, share in shares.items()),
        ("device hours", _describe_number(facts["device_hours"])),
        ("hours on the clock", _describe_number(facts["wall_hours"])),
        ("energy", "not known" if facts["kwh"] is None else f"{_describe_number(facts['kwh'])} kWh, estimate"),
        *_priced(facts),
        (
            "trained of all numbers",
            f"{describe_count(work['trained_parameters'])} of {describe_count(work['parameters'])}",
        ),
        ("state on each device", describe_bytes(facts["state_bytes"]) + _fit(facts)),
    ]
    print_table(("", "plan"), rows)
    print_text()
    print_text(f"utilisation  {facts['utilisation_source']}")
    if facts["kwh"] is not None:
        pue = f"PUE {machines['pue']:g}" if machines["pue"] else "PUE not given, counted as 1"
        print_text(f"watts        {machines['watts']:g} a device: {machines['watts_source']}; {pue}")
    if facts["grid"]:
        print_text(f"CO2          {facts['grid']['g_per_kwh']:g} g per kWh: {facts['grid']['source']}")
    print_text(_NOTES)


def _describe_number(number: float) -> str:
    """Four digits; more would claim more than an estimate knows."""
    rounded = float(f"{number:.4g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def _priced(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if facts["co2_kg"] is not None:
        rows.append(("CO2 equivalent", f"{_describe_number(facts['co2_kg'])} kg, estimate"))
    if facts["usd"] is not None:
        rows.append(("cost by the rates given", f"{facts['usd']:,.2f} USD"))
    return rows


def _fit(facts: dict[str, Any]) -> str:
    if facts["fits"] is None:
        return ""
    memory = describe_bytes(facts["machinery"]["memory_bytes"])
    return f", fits {memory}" if facts["fits"] else f", does not fit {memory}"
