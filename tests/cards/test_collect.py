"""Facts from folders: runs, profiles, records, patches; nothing of the machine they were made on."""

import json

import pytest

from hub_moe.cards import Evidence, TrainingRun, collect_facts, find_evidence, open_model, read_facts
from hub_moe.cards.training_run import describe_energy, describe_profile, hide_folder
from hub_moe.energy import ComponentEnergy, EnergyReport, GridFactor, Rates
from hub_moe.errors import CheckpointError, ConfigError, EvaluationError

from .examples import COMMIT, FRONT_MATTER, WHOLE, make_model, render, write_evidence

SETTINGS = """
[model]
name = "/{home}/me/base"
dtype = "float32"
[data]
source = "/{home}/me/rows.jsonl"
max_length = 64
chat_template = "/{home}/me/chat.jinja"
[method]
name = "full"
[training]
learning_rate = 0.01
[output]
folder = "/{home}/me/runs/x"
"""
REPORT = {
    "method": "full",
    "model": {"name": "/{home}/me/base", "revision": None},
    "data": {
        "source": "/{home}/me/rows.jsonl",
        "kind": "files",
        "revision": None,
        "split": "train",
        "files": [{"name": "rows.jsonl", "size_bytes": 3, "sha256": "e" * 64}],
    },
    "steps": 8,
    "tokens": 1724,
    "held_out_loss": {"before": 4.9, "after": 4.5},
    "wall_s": 2.5,
    "processes": 2,
    "energy": EnergyReport((ComponentEnergy("gpu", "nvml_counter", 3600.0, 2.0),), window_s=2.0).to_dict(),
    "versions": {"python": "3.13.0"},
}
ROW = {"kind": "router", "tensors": 2, "trained_tensors": 2, "changed_tensors": 1}
CHANGES = {
    "rows": [
        {**ROW, "layer": 1, "sha256_before": "a" * 64, "sha256_after": "b" * 64},
        {**ROW, "layer": 2, "sha256_before": "a" * 64, "sha256_after": "a" * 64},
    ]
}
METRICS = [
    {"step": 1, "loss": 5.0, "tokens": 10, "imbalance": {"1": 2.0}, "dead_experts": {"1": 3}},
    {
        "step": 2,
        "loss": 4.0,
        "tokens": 20,
        "imbalance": {"1": 1.5},
        "dead_experts": {"1": 1},
        "energy_source": "measured",
    },
    {"step": 2, "eval_loss": 4.5},
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    make_model(folder / "model", readme=FRONT_MATTER)
    texts = {
        "run.toml": SETTINGS,
        "report.json": json.dumps(REPORT),
        "data_report.json": json.dumps({"train": {"documents": 36, "rows": 20, "tokens": 1191}}),
        "what_changed.json": json.dumps(CHANGES),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in METRICS),
    }
    for name, text in texts.items():
        (folder / name).write_text(text.replace("{home}", "home"), "utf-8")
    return folder


def test_a_run_is_told_without_the_folders_of_its_machine(run):
    facts = render(run / "model", run=TrainingRun(run))
    assert (facts.training.method, facts.training.tokens, facts.training.processes) == ("full", 1724, 2)
    assert facts.training.hyperparameters["data.chat_template"] == "chat.jinja"
    assert facts.datasets[0].name == "rows.jsonl"
    assert (facts.datasets[0].rows, facts.datasets[0].tokens) == (36, 1191)
    assert facts.datasets[0].files == {"rows.jsonl": "e" * 64}
    assert (facts.base.name, facts.base.relation) == ("base", "finetune")
    assert "/home" not in (run / "model" / "README.md").read_text("utf-8")
    assert "/home" not in (run / "model" / "model_card.json").read_text("utf-8")
    (kind,) = facts.training.changes
    assert (kind.tensors, kind.changed) == (4, 2)
    assert kind.sha256_before != kind.sha256_after
    (load,) = facts.expert_load
    assert (load.layers[0].dead, load.layers[0].imbalance) == (1, 1.5)
    assert (facts.energy[0].joules, facts.energy[0].how_known) == (3600.0, "measured")


def test_what_an_earlier_card_knew_of_the_same_weights_stays(run):
    first = render(run / "model", run=TrainingRun(run))
    model = open_model(str(run / "model"))
    again = collect_facts(model, Evidence(), say=lambda text: None, previous=first)
    assert (again.training, again.datasets, again.expert_load) == (first.training, first.datasets, first.expert_load)
    (run / "model" / "model.safetensors").write_bytes(b"others")
    other = collect_facts(open_model(str(run / "model")), Evidence(), say=lambda text: None, previous=first)
    assert (other.training, other.datasets, other.expert_load) == (None, (), ())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", None, "it has no run.toml"),
        ("report.json", None, "it has no report.json"),
        ("report.json", "{", "truncated or not JSON"),
        ("report.json", "{}", "not a whole report of a run"),
        ("metrics.jsonl", "{\n", "is damaged"),
        ("metrics.jsonl", "3\n", "must be a JSON object"),
        ("run.toml", "=", "not valid TOML"),
    ],
)
def test_a_damaged_or_unfinished_run_is_refused(run, name, text, message):
    (run / name).unlink() if text is None else (run / name).write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message):
        render(run / "model", run=TrainingRun(run))


PROFILE = {
    "domains": {
        "law": {
            "dataset": {"source": "alice/laws", "revision": COMMIT},
            "num_tokens": 20,
            "layers": {"1": {"tokens": [10, 10, 0, 0]}, "2": {"tokens": [5, 5, 5, 5]}, "3": {"tokens": [0, 0, 0, 0]}},
        }
    }
}


def test_a_profile_tells_dead_experts_imbalance_and_evenness_on_a_named_text():
    (load,) = describe_profile(PROFILE)
    assert (load.domain, load.dataset, load.tokens) == ("law", "alice/laws at 0123456789ab", 20)
    assert [(layer.dead, layer.imbalance, layer.entropy) for layer in load.layers] == [
        (2, 2.0, pytest.approx(0.5)),
        (0, 1.0, pytest.approx(1.0)),
        (4, 1.0, None),
    ]


@pytest.mark.parametrize("profile", [{}, {"domains": {"a": {}}}, {"domains": 3}])
def test_another_mapping_is_no_profile(profile):
    with pytest.raises(ConfigError, match="expert profile is not whole"):
        describe_profile(profile)


GPU = ComponentEnergy("gpu", "nvml_counter", 5.0, 2.0)
CPU = ComponentEnergy("cpu", "codecarbon_model", 5.0, 2.0)
NO_RAM = ComponentEnergy("ram", "none", None, 2.0)


@pytest.mark.parametrize(
    ("components", "how", "joules"),
    [((GPU, NO_RAM), "measured", 5.0), ((GPU, CPU), "estimate", 10.0), ((NO_RAM,), "not measured", None)],
)
def test_energy_is_measured_an_estimate_or_not_measured_and_never_zero_for_nothing(components, how, joules):
    rates = Rates(usd_per_hour=3600.0)
    report = EnergyReport(components, 2.0, device_hours=0.001, grid=GridFactor(56.0, "somebody"), rates=rates)
    energy = describe_energy("training", report.to_dict())
    assert (energy.how_known, energy.joules, energy.method) == (how, joules, report.label)
    assert set(energy.details) == ({"usd"} if joules is None else {"co2_g", "co2_source", "usd"})
    assert describe_energy("training", None).joules is None


def test_an_energy_block_that_was_edited_is_refused():
    with pytest.raises(ConfigError, match="it was edited"):
        describe_energy("training", {**EnergyReport((GPU,), 2.0).to_dict(), "joules": 1.0})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/" + "home/me/rows.jsonl", "rows.jsonl"),
        ("file:///" + "home/me/x", "x"),
        ("C:\\Users\\me\\x", "x"),
        ("~/x/y", "y"),
        ("openai/gsm8k", "openai/gsm8k"),
        ("runs/x", "runs/x"),
        ("auto", "auto"),
    ],
)
def test_absolute_paths_lose_their_folders(text, shown):
    assert hide_folder(text) == shown


def test_the_newest_record_of_each_suite_stands_in_the_card(tmp_path):
    folder = make_model(tmp_path / "law")
    write_evidence(folder / "evals", scores=(1.0, 0.0, 1.0, 0.0), created="2026-11-01T00:00:00Z")
    write_evidence(folder / "evals", scores=(1.0, 1.0, 1.0, 0.0), created="2026-11-02T00:00:00Z")
    (evaluation,) = render(folder).evaluations
    assert evaluation.results[0].value == 0.75


def test_the_command_of_a_record_is_told_without_folders(tmp_path):
    folder = make_model(tmp_path / "law")
    home = "/" + "home/me"
    command = ("hub-moe", "eval", f"{home}/law", f"--data-dir={home}/data", "--suite", "a suite; rm")
    write_evidence(folder / "evals", command=command)
    (evaluation,) = render(folder).evaluations
    assert evaluation.command == "hub-moe eval law --data-dir=data --suite 'a suite; rm'"


def test_an_edited_record_stops_the_card_and_nothing_is_written(tmp_path):
    folder = make_model(tmp_path / "law")
    stored = write_evidence(folder / "evals")
    stored.path.write_text(stored.path.read_text("utf-8").replace("0.8", "0.9"), "utf-8")
    with pytest.raises(EvaluationError, match="was edited"):
        render(folder)
    assert (folder / "README.md").read_text("utf-8") == FRONT_MATTER
    assert read_facts(folder) is None


def test_an_invalid_front_matter_stops_the_card_and_nothing_is_written(tmp_path):
    folder = make_model(tmp_path / "law", readme="---\nlicense: [\n---\n# Law\n")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ConfigError, match="not valid YAML"):
        render(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (folder / "README.md").read_text("utf-8").startswith("---\nlicense: [")


def test_names_that_are_no_model_or_no_records_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder nor the id of a repo"):
        open_model("no such folder")
    with pytest.raises(ConfigError, match="is no folder of records"):
        find_evidence(tmp_path, [tmp_path / "absent"])


def test_a_damaged_patch_is_refused(tmp_path):
    folder = make_model(tmp_path / "law")
    (folder / "expert_patch.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="lacks the field"):
        render(folder)


def test_an_adapter_names_its_base_and_commit(tmp_path):
    folder = make_model(tmp_path / "law")
    base = make_model(tmp_path / "base", readme="---\nlicense: gemma\n---\n")
    fields = {"base_model_name_or_path": str(base), "revision": COMMIT}
    (folder / "adapter_config.json").write_text(json.dumps(fields), "utf-8")
    facts = render(folder)
    assert (facts.model.kind, facts.base.name, facts.base.revision) == ("adapter", "base", COMMIT)
    assert facts.license.verdict == "conflict"
    assert "from peft import" in (folder / "README.md").read_text("utf-8")


def test_the_base_of_a_base_is_known_from_its_own_facts(tmp_path):
    from hub_moe.files.json_files import write_json

    base = make_model(tmp_path / "base")
    write_json(base / "model_card.json", WHOLE.to_dict())
    folder = make_model(tmp_path / "law")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}), "utf-8")
    lineage = render(folder).lineage
    assert [each.name for each in lineage] == ["base", "alice/base", "bob/root"]
    assert lineage[1].revision == COMMIT
    assert lineage[0].license == "mit"
