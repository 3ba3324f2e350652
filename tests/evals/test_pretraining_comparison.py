"""The program in evals/pretraining: a fair comparison, runs that are made once, and arithmetic that is right."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hub_moe.errors import ConfigError, DatasetError
from hub_moe.modeling import HubMoeForCausalLM

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evals" / "results" / "pretraining"
MODULES = ("arms", "texts", "training", "single_run", "summary", "report", "plot", "step_times", "compare")


@pytest.fixture(scope="module")
def program():
    """The modules of the program, which import each other as scripts do."""
    sys.path.insert(0, str(ROOT / "evals" / "pretraining"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(ROOT / "evals" / "pretraining"))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def text(program, tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("".join(f"{i}. To be, or not to be: {i * i} is the question.\n" for i in range(400)), "utf-8")
    return program.texts.read_text(str(path), name="play", vocab_size=400, block_length=32, held_out_blocks=4)


@pytest.fixture
def run(program, text, tmp_path):
    """Runs an arm for 3 steps, or reads its record."""

    def run(name="fine-lossfree", *, seed=0, learning_rate=4e-3, folder="runs"):
        arm = program.arms.ARMS[name]
        plan = program.single_run.plan_run(arm, steps=3, batch_size=2, learning_rate=learning_rate, seed=seed)
        return program.single_run.run_or_read(arm, text, plan, tmp_path / folder / f"{name}-{seed}.json")

    return run


def make_record(arm, seed, *, loss, imbalance=(), text="play", dead=()):
    layers = list(range(len(imbalance)))
    return {
        "arm": arm,
        "text": text,
        "seed": seed,
        "settings": {"corpus": {"source": "play", "sha256": "0" * 64, "train_tokens": 1000, "held_out_tokens": 100}},
        "cost": {
            "parameters": 10,
            "active_parameters": 5,
            "router_parameters": 1,
            "training_flops_per_token": 30_000_000,
        },
        "tokens": 500,
        "held_out_losses": [{"tokens": 250, "loss": loss + 1}, {"tokens": 500, "loss": loss}],
        "layers": layers,
        "imbalance_over_time": [{"share_of_training": 1.0, "layers": list(imbalance)}] if layers else [],
        "imbalance": list(imbalance),
        "dead_experts": list(dead) or [0 for _ in layers],
    }


def test_arms_do_equal_work_but_for_the_router(program):
    footprints = {arm.name: program.arms.measure_arm(arm) for arm in program.arms.ARMS.values()}
    dense = footprints["dense"]
    for name, footprint in footprints.items():
        router = footprint.by_kind().get("router", (0, 0))[0]
        assert footprint.num_active - router == dense.num_active, name
        assert footprint.training_flops(256) - 6 * router == dense.training_flops(256), name
        assert footprint.training_flops(256) <= 1.02 * dense.training_flops(256), name


def test_coarse_and_fine_experts_have_equal_size_in_all_but_for_the_router(program):
    routed_and_shared = set()
    for name in ("coarse-aux", "fine-lossfree", "fine-aux", "fine-none"):
        kinds = program.arms.measure_arm(program.arms.ARMS[name]).by_kind()
        routed_and_shared.add(kinds["routed_experts"][0] + kinds.get("shared_experts", (0, 0))[0])
    assert len(routed_and_shared) == 1


@pytest.mark.parametrize("name", ["dense", "fine-aux"])
def test_measured_parameters_are_those_of_the_model(program, name):
    arm = program.arms.ARMS[name]
    assert program.arms.measure_arm(arm).num_parameters == HubMoeForCausalLM(arm.config()).num_parameters()


@pytest.mark.parametrize("name", ["coarse-aux", "fine-aux"])
def test_a_block_of_experts_starts_with_the_variance_of_the_dense_block(program, name):
    hidden = torch.randn(1, 2000, program.arms.SHARED_FIELDS["hidden_size"])

    def variance(arm):
        with torch.no_grad():
            return HubMoeForCausalLM(arm.config()).model.layers[0].mlp(hidden).var().item()

    assert variance(program.arms.ARMS[name]) == pytest.approx(variance(program.arms.ARMS["dense"]), rel=0.15)


def test_arms_of_one_family_differ_only_in_their_balancing(program):
    arms = program.arms.ARMS
    assert {**arms["fine-aux"].fields, "aux_loss_alpha": None, "seq_aux": None} == {
        **arms["fine-lossfree"].fields,
        "aux_loss_alpha": None,
        "seq_aux": None,
    }
    assert arms["fine-none"].fields == arms["fine-lossfree"].fields
    assert arms["fine-none"].balancing_speed == arms["fine-aux"].balancing_speed == 0
    assert arms["fine-lossfree"].balancing_speed > 0


def test_a_run_records_losses_load_and_cost(run):
    record = run("fine-lossfree")
    assert [point["tokens"] for point in record["held_out_losses"]] == [64, 128, 192]
    assert record["tokens"] == 192
    assert record["layers"] == [0, 1]
    assert all(1 <= value <= 31 / 7 + 1e-3 for value in record["imbalance"])
    assert record["imbalance_over_time"][-1]["share_of_training"] == 1
    assert len(record["dead_experts"]) == 2
    assert record["settings"]["training"]["seed"] == record["seed"] == 0
    assert record["settings"]["corpus"]["sha256"]
    assert record["cost"]["parameters"] > 2 * record["cost"]["active_parameters"]


def test_a_model_without_experts_has_no_load(run):
    record = run("dense")
    assert record["layers"] == record["imbalance"] == record["imbalance_over_time"] == record["dead_experts"] == []
    assert len(record["held_out_losses"]) == 3


def test_a_run_again_gives_the_same_record(run):
    assert run(folder="first") == run(folder="second")
    assert run(folder="first")["held_out_losses"] != run(folder="first", seed=1)["held_out_losses"]


def test_a_finished_run_is_read_and_not_made_again(run, tmp_path):
    path = tmp_path / "runs" / "fine-lossfree-0.json"
    record = {**run(), "tokens": 7}
    path.write_text(json.dumps(record), "utf-8")
    assert run() == record


def test_a_record_of_other_settings_is_refused(run):
    run()
    with pytest.raises(ConfigError, match=r"fine-lossfree-0\.json holds a run with another training; choose another"):
        run(learning_rate=1e-3)


def test_steps_that_leave_the_last_one_unmeasured_are_refused(program):
    with pytest.raises(ConfigError, match="--steps 25 must be a multiple of 10"):
        program.single_run.plan_run(program.arms.ARMS["dense"], steps=25, batch_size=1, learning_rate=1e-3, seed=0)


def test_the_last_tenth_of_a_file_is_held_out(program, tmp_path):
    (tmp_path / "digits.txt").write_text("1" * 900 + "2" * 100, "utf-8")
    text = program.texts.read_text(
        str(tmp_path / "digits.txt"), name="digits", vocab_size=300, block_length=4, held_out_blocks=99
    )
    decode = text.tokenizer.decode
    assert set(decode(text.train_blocks.flatten(), skip_special_tokens=True)) == {"1"}
    assert set(decode(text.held_out_blocks.flatten(), skip_special_tokens=True)) == {"2"}
    assert text.held_out_blocks.numel() >= 100


def test_a_file_that_is_not_there_is_named(program):
    with pytest.raises(DatasetError, match=r"no file missing\.txt"):
        program.texts.read_text("missing.txt", name="x", vocab_size=300, block_length=4, held_out_blocks=1)


def test_differences_are_paired_by_seed_and_have_a_t_interval(program):
    result = program.summary.compare_paired({0: 1.0, 1: 2.0, 2: 3.0, 5: 9.0}, {0: 1.1, 1: 2.2, 2: 3.3, 7: 0.0})
    assert result["seeds"] == [0, 1, 2]
    assert result["difference"] == -0.2
    half_width = 4.30265 * 0.1 / 3**0.5  # t quantile of 2 degrees of freedom
    assert result["interval"] == pytest.approx([-0.2 - half_width, -0.2 + half_width], abs=1e-4)
    assert result["is_clear"] is False
    assert program.summary.compare_paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.501})["is_clear"] is True


@pytest.mark.parametrize(
    ("difference", "is_clear", "claim", "verdict"),
    [
        (-0.1, True, "x", "agrees"),
        (0.1, True, "x", "contradicts"),
        (0.1, False, "x", "within seed noise"),
        (0.1, None, "x", "one seed only"),
        (0.1, True, None, "higher"),
        (-0.1, True, None, "lower"),
    ],
)
def test_a_claim_is_judged_only_by_a_clear_difference(program, difference, is_clear, claim, verdict):
    assert program.summary.judge(difference, is_clear, claim) == verdict


def test_the_summary_holds_means_deviations_and_the_comparisons_that_are_possible(program):
    records = [
        *(make_record("dense", seed, loss=3.0 + 0.1 * seed) for seed in range(3)),
        *(
            make_record("fine-lossfree", seed, loss=2.9 + 0.1 * seed, imbalance=(1.1, 1.2 + 0.1 * seed), dead=(1, 2))
            for seed in range(2)
        ),
        make_record("fine-aux", 0, loss=2.8, imbalance=(1.5, 1.4)),
    ]
    facts = program.summary.summarise(records)["play"]
    assert list(facts["arms"]) == ["dense", "fine-lossfree", "fine-aux"]
    assert facts["arms"]["dense"]["held_out_loss"] == {"mean": 3.1, "deviation": 0.1}
    assert facts["arms"]["dense"]["imbalance"] is facts["arms"]["dense"]["dead_experts"] is None
    assert facts["arms"]["fine-lossfree"]["imbalance"] == {"mean": 1.25, "deviation": 0.0707}
    assert facts["arms"]["fine-lossfree"]["dead_experts"] == {"mean": 3, "deviation": 0}
    found = {(row["arm"], row["against"], row["measure"]): row for row in facts["comparisons"]}
    assert set(found) == {
        ("fine-lossfree", "dense", "held_out_loss"),
        ("fine-aux", "dense", "held_out_loss"),
        ("fine-lossfree", "fine-aux", "held_out_loss"),
        ("fine-lossfree", "fine-aux", "imbalance"),
    }
    assert found["fine-lossfree", "dense", "held_out_loss"]["difference"] == -0.1
    assert found["fine-lossfree", "dense", "held_out_loss"]["seeds"] == [0, 1]
    assert found["fine-lossfree", "fine-aux", "imbalance"]["difference"] == -0.3
    assert found["fine-lossfree", "fine-aux", "imbalance"]["verdict"] == "one seed only"


def test_texts_are_summed_up_apart(program):
    records = [make_record("dense", 0, loss=3.0), make_record("dense", 0, loss=4.0, text="other")]
    summary = program.summary.summarise(records)
    assert summary["play"]["arms"]["dense"]["held_out_loss"] == {"mean": 3.0, "deviation": None}
    assert summary["other"]["arms"]["dense"]["held_out_loss"]["mean"] == 4.0


def test_the_report_shows_contradictions_and_the_picture_is_drawn(program, tmp_path):
    records = [make_record("dense", seed, loss=3.0 + 0.1 * seed) for seed in range(2)]
    records += [make_record("coarse-aux", 0, loss=3.5, imbalance=(1.5,))]
    records += [make_record("coarse-aux", 1, loss=3.601, imbalance=(1.6,))]
    report = program.report.render_report(program.summary.summarise(records), {"dense": 1.0, "coarse-aux": 1.25})
    assert "**contradicts**" in report
    assert "| 3.0500 ± 0.0707 |" in report
    assert "| 1.25 |" in report
    program.plot.plot_comparison([*records, make_record("dense", 0, loss=3, text="other")]).savefig(
        tmp_path / "plot.png"
    )
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_step_times_are_relative_to_the_first_arm(program):
    arms = [program.arms.ARMS["dense"], program.arms.ARMS["fine-none"]]
    times = program.step_times.measure_step_times(arms, torch.ones(1, 8, dtype=torch.int64), rounds=1)
    assert times["dense"] == 1
    assert times["fine-none"] > 0


def test_the_program_makes_everything_from_one_command(program, tmp_path, monkeypatch, capsys):
    (tmp_path / "play.txt").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(3000)), "utf-8")
    options = ["--arms", "dense", "coarse-aux", "--seeds", "1", "--steps", "1"]
    options += ["--batch-size", "1", "--held-out-blocks", "2"]
    paths = ["--text", str(tmp_path / "play.txt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *paths, *options])
    threads = torch.get_num_threads()
    program.compare.main()
    torch.set_num_threads(threads)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "figures.md")
    made = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert made == [
        "comparison.png",
        "figures.md",
        "runs/play-coarse-aux-seed0.json",
        "runs/play-dense-seed0.json",
        "step_times.json",
        "summary.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "0 is no whole number from 1 on"),
        (["--arms", "sparse"], "invalid choice: 'sparse'"),
        (["--text", "missing.txt"], "There is no file missing.txt"),
    ],
)
def test_wrong_options_end_in_one_sentence(program, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    with pytest.raises(SystemExit) as end:
        program.compare.main()
    assert message in f"{capsys.readouterr().err}{end.value}"


def test_committed_figures_are_those_of_the_committed_runs(program):
    summary = program.summary.summarise(program.summary.read_records(RESULTS / "runs"))
    step_times = json.loads((RESULTS / "step_times.json").read_text("utf-8"))
    assert json.loads((RESULTS / "summary.json").read_text("utf-8")) == json.loads(json.dumps(summary))
    assert (RESULTS / "figures.md").read_text("utf-8") == program.report.render_report(summary, step_times)


def test_committed_runs_of_a_text_differ_in_arm_and_seed_only(program):
    for text in program.summary.summarise(records := program.summary.read_records(RESULTS / "runs")):
        found = [record for record in records if record["text"] == text]
        assert len({json.dumps(record["settings"]["corpus"]) for record in found}) == 1
        assert len({json.dumps(record["versions"]) for record in found}) == 1
        assert len({record["tokens"] for record in found}) == 1
