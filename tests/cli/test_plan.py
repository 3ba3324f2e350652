import json
import re
import sys
from pathlib import Path

import pytest

from hub_moe.cli.main import main
from hub_moe.cli.plan import plan as command
from hub_moe.energy import EnergyReport

from ..training.runs import make_tables, save_base, write_rows
from ..training.runs import run as train

README = Path(__file__).parents[2] / "README.md"
# arXiv:2412.19437 table 1: pre-training of DeepSeek-V3, 14.8 T tokens in sequences of 4096
V3 = ("deepseek-v3", "--tokens", "14.8T", "--context", 4096, "--device", "h800", "--devices", 2048)


@pytest.fixture(scope="module")
def plan():
    """Run `hub-moe plan` in this process: `(exit code, stdout, stderr)`."""
    import contextlib
    import io

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        before, sys.argv = sys.argv, ["hub-moe", "plan", *map(str, arguments)]
        try:
            with pytest.raises(SystemExit) as exit_, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        finally:
            sys.argv = before
        return exit_.value.code or 0, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def v3(plan):
    code, out, err = plan(*V3, "--device-hours", "2.664M", "--usd-per-hour", 2, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_the_published_hours_of_deepseek_v3_imply_a_utilisation(v3):
    assert v3["mtp_trained"]
    # 6 x 37 B active weights, the MTP layer, and attention to 4096 tokens in 61 layers of 128 heads
    assert v3["workload"]["attention_flops_per_token"] == 3 * 61 * 2 * 4096 * 128 * (128 + 64 + 128)
    assert v3["workload"]["flops_per_token"] == pytest.approx(290.8e9, rel=1e-3)
    assert v3["utilisation_of"]["bf16"] == pytest.approx(0.454, abs=5e-4)
    assert v3["utilisation_of"]["fp8"] == pytest.approx(v3["utilisation_of"]["bf16"] / 2, rel=1e-3)
    # "less than two months" on 2048 GPUs; 180 K hours for a trillion tokens
    assert 53 < v3["wall_hours"] / 24 < 60
    assert v3["device_hours"] / 14.8 == pytest.approx(180e3, rel=1e-3)
    # 2.788 M hours with the context's extension and post-training are 5.576 M USD
    assert v3["usd"] * 2788 / 2664 == pytest.approx(5.576e6)
    assert v3["fits"]


@pytest.mark.parametrize("text", [README.read_text("utf-8"), command.__doc__], ids=["README", "help"])
def test_what_is_written_about_deepseek_v3_is_what_is_computed(v3, text):
    shares = [f"{100 * v3['utilisation_of'][name]:.1f} %" for name in ("bf16", "fp8")]
    sentence = " ".join(text[text.index("published hours") :].split())
    assert re.findall(r"\d+\.\d %", sentence)[:2] == shares


def test_deepseek_v2_reached_less_on_the_same_gpus(plan, v3):
    # arXiv:2405.04434 section 3.2.3: 172.8 K H800 hours for a trillion tokens, in BF16
    _, out, _ = plan("deepseek-v2", "--tokens", "1T", "--device", "h800", "--device-hours", "172.8K", "--json")
    share = json.loads(out)["utilisation_of"]["bf16"]
    assert 0.25 < share < v3["utilisation_of"]["bf16"]


def test_a_stated_utilisation_gives_the_hours_back(plan, v3):
    share = v3["utilisation_of"]["fp8"]
    _, out, _ = plan(*V3, "--precision", "fp8", "--utilisation", share, "--json")
    assert json.loads(out)["device_hours"] == pytest.approx(2.664e6)


NANO = ("nano", "--tokens", "1B")
STATED = (*NANO, "--tflops", 1, "--utilisation", 0.5)


def test_chosen_experts_save_less_than_a_third_of_the_operations_and_most_of_the_state(plan):
    def read(*options):
        return json.loads(plan("deepseek-v2-lite", "--tokens", "1M", *STATED[3:], "--json", *options)[1])

    full, experts, lora = (read("--method", method) for method in ("full", "experts", "lora"))
    assert full["flops"] * 2 / 3 < experts["flops"] < full["flops"]
    assert experts["state_bytes"] < full["state_bytes"] / 2
    assert lora["workload"]["trained_parameters"] < experts["workload"]["trained_parameters"] / 100
    more = read("--method", "experts", "--expert-share", 0.5)
    assert experts["flops"] < more["flops"] < full["flops"]


@pytest.mark.parametrize("columns", [80, 120])
def test_people_read_a_table_with_words_for_what_is_not_known(plan, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = plan(*STATED)
    cells = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "energy not known" in cells
    assert "utilisation of the BF16 peak 50.0 %" in cells
    assert not any("CO2 equivalent" in cell or "USD" in cell for cell in cells)
    _, out, _ = plan(*STATED, "--watts", 300, "--g-per-kwh", 56, "--usd-per-hour", 2, "--pue", 1.1)
    assert "kWh, estimate" in out
    assert "kg, estimate" in out
    assert "300 a device: given; PUE 1.1" in out
    assert "56 g per kWh: given" in out


def test_co2_of_a_declared_country_names_its_source(plan):
    pytest.importorskip("codecarbon")
    _, out, _ = plan(*STATED, "--watts", 300, "--country", "FRA", "--json")
    facts = json.loads(out)
    assert facts["grid"]["source"].startswith("codecarbon ")
    assert facts["co2_kg"] == pytest.approx(facts["kwh"] * facts["grid"]["g_per_kwh"] / 1000)


def _run_folder(folder, *, energy=True, report=True):
    folder.mkdir()
    row = {"step": 1, "tokens": 100, "tokens_per_s": 10.0, "utilisation": 0.25, "peak_flops": 2e11}
    (folder / "metrics.jsonl").write_text(json.dumps(row | {"peak_source": "measured: a matrix product"}) + "\n")
    cpu = {"component": "cpu", "method": "rapl", "joules": 1000.0, "window_s": 10.0}
    figures = {"processes": 2, "energy": {"components": [cpu], "window_s": 10.0} if energy else None}
    if report:
        (folder / "report.json").write_text(json.dumps(figures))
    return folder


def test_a_run_gives_utilisation_peak_and_watts(plan, tmp_path):
    _, out, _ = plan(*NANO, "--measured", _run_folder(tmp_path / "run"), "--json")
    facts = json.loads(out)
    assert (facts["utilisation"], facts["machinery"]["peak_flops"]) == (0.25, 1e11)
    assert facts["machinery"]["watts"] == 50.0
    assert facts["machinery"]["watts_source"].endswith("run: measured")
    _, out, _ = plan(*NANO, "--measured", _run_folder(tmp_path / "bare", energy=False), "--device", "h100", "--json")
    assert json.loads(out)["machinery"]["watts"] == 700


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*NANO, "--utilisation", 0.5), "Say on what the model is trained"),
        ((*NANO, "--device", "h80", "--utilisation", 0.5), "There is no device 'h80'; did you mean h800"),
        ((*NANO, "--device", "a100", "--precision", "fp8", "--utilisation", 0.5), "a100 has no FP8"),
        ((*NANO, "--device", "cpu", "--utilisation", 0.5), "give --tflops"),
        ((*STATED, "--device", "h100"), "give one of them"),
        ((*NANO, "--tflops", 1), "Give one of --utilisation, --device-hours and --measured"),
        ((*STATED, "--device-hours", 1), "Give one of --utilisation"),
        ((*NANO, "--tflops", 1, "--utilisation", 0), "The utilisation is 0"),
        ((*NANO, "--tflops", 1, "--utilisation", 1.5), "The utilisation is 1.5"),
        ((*NANO, "--tflops", -1, "--utilisation", 0.5), "peak_flops is -1e+12"),
        ((*NANO, "--tflops", 1, "--device-hours", 1), "too few"),
        (("nano", "--tokens", "-5", *STATED[3:]), "tokens is -5; expected more than 0"),
        ((*STATED, "--country", "Frankreich"), "no CO2 figure for the country"),
        ((*STATED, "--country", "FRA", "--g-per-kwh", 1), "--country and --g-per-kwh"),
        ((*STATED, "--usd-per-hour", -2), "USD per device hour is -2"),
        ((*STATED, "--pue", 0.5), "PUE is 0.5"),
        ((*STATED, "--expert-share", 0), "--expert-share is 0"),
        (("nanno", *STATED[1:]), "did you mean nano"),
        ((*NANO, "--measured", "nowhere"), "There is no run folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence(plan, arguments, message):
    code, out, err = plan(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("amount", ["", "many", "1.5.2T", "3Q", "inf", "nan"])
def test_an_amount_that_is_none_is_wrong_usage(plan, amount):
    code, _, err = plan("nano", "--tokens", amount, *STATED[3:])
    assert code == 2
    assert "is not an amount" in err


def test_a_run_that_does_not_tell_is_refused(plan, tmp_path):
    unfinished = _run_folder(tmp_path / "unfinished", report=False)
    assert "no report.json yet" in plan(*NANO, "--measured", unfinished)[2]
    assert "leave --precision out" in plan(*NANO, "--measured", unfinished, "--precision", "fp8")[2]
    edited = _run_folder(tmp_path / "edited")
    report = json.loads((edited / "report.json").read_text())
    report["energy"]["joules"] = 5.0
    (edited / "report.json").write_text(json.dumps(report))
    assert "it was edited" in plan(*NANO, "--measured", edited)[2]
    (edited / "metrics.jsonl").write_text("")
    assert "no row with a utilisation yet" in plan(*NANO, "--measured", edited)[2]


def test_a_run_that_was_really_metered_is_planned_from(plan, tmp_path, tiny_tokenizer):
    pytest.importorskip("codecarbon")
    base = save_base(tmp_path / "base", "deepseek_v3", tiny_tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl")
    tables = make_tables(tmp_path / "run", base=base, rows=rows, method={"name": "full"}, energy=True)
    report = train(tables).report
    energy = EnergyReport.from_dict(report["energy"])
    assert (energy.tokens, energy.kwh) == (report["tokens"], report["energy_kwh"])
    assert energy.joules_per_1000_tokens > 0
    code, out, err = plan(base, "--tokens", "1M", "--measured", tmp_path / "run", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["machinery"]["watts"] == pytest.approx(energy.joules / energy.window_s)
    assert facts["machinery"]["watts_source"].endswith(f"run: {energy.label}")
    assert facts["machinery"]["peak_source"].startswith("measured: ")
