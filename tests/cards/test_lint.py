"""`card lint` finds every number that its evidence does not say."""

import json
import shutil

import pytest
import yaml

from hub_moe.cards import lint_card, open_model
from hub_moe.errors import ConfigError

from .examples import make_model, render, write_evidence

CITED = "Another model says accuracy 99.1 % ([source](https://example.org))."


@pytest.fixture
def model(tmp_path):
    """A folder with a card in order, and prose that says its number."""
    prose = f"# Law\n\n## Intended use\n\nThe accuracy is 80.0 % (0.8).\n\n{CITED}\n\n## Limitations\n\nMany.\n"
    folder = make_model(tmp_path / "law", readme=f"---\nlicense: mit\n---\n{prose}")
    write_evidence(folder / "evals")
    render(folder)
    return folder


def lint(folder, **options):
    return [str(finding) for finding in lint_card(open_model(str(folder)), **options)]


def edit(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def edit_json(path, change):
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def record_of(folder):
    return next((folder / "evals").glob("*.json"))


def test_a_card_in_order_has_no_finding(model):
    assert lint(model) == []


def test_a_number_in_a_table_that_was_edited_by_hand_is_found_with_its_line(model):
    edit(model / "README.md", "0.8000 ±", "0.9000 ±")
    (finding,) = lint(model)
    assert "the block 'evaluation' differs" in finding
    line = int(finding.split(":")[1])
    assert "hub_moe:begin evaluation" in (model / "README.md").read_text("utf-8").splitlines()[line - 1]


def test_a_number_changed_in_the_card_and_in_its_facts_is_found_by_its_record(model):
    edit_json(model / "model_card.json", lambda data: data["evaluations"][0]["results"][0].update(value=0.9))
    edit(model / "README.md", "0.8000 ±", "0.9000 ±")
    edit(model / "README.md", "value: 0.8", "value: 0.9")
    edit(model / ".eval_results" / "cloze.yaml", "value: 0.8", "value: 0.9")
    assert lint(model) == [
        "model_card.json: says other numbers of " + record_of(model).name + " than the record itself"
    ]


def test_an_edited_record_is_found(model):
    edit_json(record_of(model), lambda data: data["entries"][0]["metrics"][0].update(value=0.9))
    assert any("was edited" in finding for finding in lint(model))


def test_an_edited_record_with_a_new_id_is_another_record(model):
    from hub_moe.evals.records.record import hash_json

    def change(data):
        data["entries"][0]["metrics"][0].update(value=0.9)
        data["id"] = hash_json({key: value for key, value in data.items() if key != "id"})

    edit_json(record_of(model), change)
    assert any("is another record than the one" in finding for finding in lint(model))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_missing_records_and_samples_are_found(model, suffix):
    next((model / "evals").glob(f"*{suffix}")).unlink()
    assert any("missing" in finding for finding in lint(model))


def test_edited_samples_are_found(model):
    with next((model / "evals").glob("*.parquet")).open("ab") as file:
        file.write(b"x")
    assert any("was edited: it has the hash" in finding for finding in lint(model))


def test_records_may_lie_elsewhere_when_they_are_named(model, tmp_path):
    shutil.move(model / "evals", tmp_path / "far")
    assert any("is missing" in finding for finding in lint(model))
    assert lint(model, records=[tmp_path / "far"]) == []


def test_a_record_outside_of_the_folder_is_no_evidence(model, tmp_path):
    shutil.copytree(model / "evals", tmp_path / "elsewhere")
    name = f"../../elsewhere/{record_of(model).name}"
    edit_json(model / "model_card.json", lambda data: data["evaluations"][0].update(file=name))
    assert any("is no name of a record" in finding for finding in lint(model))


def test_other_weights_than_the_card_was_made_for_are_found(model):
    (model / "model.safetensors").write_bytes(b"others")
    assert lint(model) == [
        "model_card.json: the file of weights model.safetensors has another sha256; render the card again"
    ]


def test_a_record_of_another_model_is_never_claimed_and_found_where_it_is(model, tmp_path):
    told = []
    other = make_model(tmp_path / "other", b"others")
    shutil.copytree(model / "evals", other / "evals")
    facts = render(other, say=told.append)
    assert facts.evaluations == ()
    assert told == [f"Not claimed, since they are records of other weights: {record_of(other).name} (law)."]

    def claim(data):
        data["evaluations"] = json.loads((model / "model_card.json").read_text("utf-8"))["evaluations"]

    edit_json(other / "model_card.json", claim)
    assert any("is a record of other weights" in finding for finding in lint(other))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value: 0.8\n", "value: 0.85\n", "model-index says 0.85 for cloze, but its record says 0.8"),
        ("stderr: 0.13", "stderr: 0.03", "model-index says 0.8 for cloze, but its record"),
        ("record_sha256: ", "record_sha256: 00", "model-index says 0.8 for cloze, which no record says"),
        ("license: mit\n", "", "the front matter has no license"),
        ("pipeline_tag: text-generation\n", "", "the front matter has no pipeline_tag"),
        ("license: mit", "license: [mit", "not valid YAML"),
        ("license: mit", "license: mit\nmodel-index: 3", "the key 'model-index' twice"),
        ("license: mit", "license: mit\nbase_model: alice/base", "the base alice/base has no commit"),
        ("Many.", "More Information Needed", "has the placeholder 'More Information Needed'"),
        ("Many.", "[More Information Needed]", "has the placeholder"),
        ("Many.", "See /" + "home/me/runs/x.", "names a local path, '/" + "home/me/runs/x'"),
        ("Many.", "See C:\\Users\\me.", "names a local path"),
        ("Many.", "![loss](card/loss.png)", "shows the picture card/loss.png, which is missing"),
        ("Many.", "The accuracy is 81.0 %.", "'81.0 %' looks like a result that no record has"),
        ("Many.", "GSM8K: 0.61", "'0.61' looks like a result"),
        ("Many.", "<!-- hub_moe:begin x -->", "README.md: begins the block 'usage' inside of 'x'"),
        ("Many.", "<!-- hub_moe:begin x -->\n1\n<!-- hub_moe:end x -->", "'x' is not one that the facts give"),
    ],
)
def test_what_is_wrong_in_a_readme_is_said_in_a_sentence(model, old, new, message):
    edit(model / "README.md", old, new)
    assert any(message in finding for finding in lint(model)), lint(model)


def test_a_result_of_the_model_index_without_a_record_is_found_unless_the_hub_vouches(model):
    def put(metric):
        text = (model / "README.md").read_text("utf-8")
        front = yaml.safe_load(text.split("---")[1])
        result = {"task": {"type": "t"}, "dataset": {"name": "HLE", "type": "cais/hle"}, "metrics": [metric]}
        front["model-index"][0]["results"].append(result)
        (model / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n" + text.split("---\n", 2)[2], "utf-8")

    put({"type": "acc", "value": 0.3, "verifyToken": "x.y.z"})
    assert lint(model) == []
    put({"type": "acc", "value": 0.4})
    assert lint(model) == ["README.md: model-index says 0.4 for HLE, which no record says"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- dataset: {id: cais/hle, task_id: hle}\n  value: 20.9\n", "says 20.9 for cais/hle, which no record says"),
        ("- dataset: {id: cais/hle}\n", "is not a list of results"),
        ("[", "is not valid YAML"),
    ],
)
def test_results_for_leaderboards_without_a_record_are_found(model, text, message):
    (model / ".eval_results" / "more.yaml").write_text(text, "utf-8")
    (finding,) = lint(model)
    assert finding.startswith(".eval_results/more.yaml: ")
    assert message in finding


def test_every_finding_is_told_at_once(model):
    edit(model / "README.md", "license: mit\n", "")
    edit(model / "README.md", "Many.", "TODO: accuracy 0.123")
    record_of(model).unlink()
    assert len(lint(model)) >= 4


def test_a_card_without_facts_has_no_number_with_a_record(model):
    (model / "model_card.json").unlink()
    findings = lint(model)
    assert any("model_card.json: is missing" in finding for finding in findings)
    assert any("model-index says 0.8" in finding for finding in findings)
    assert any("'80.0 %' looks like a result" in finding for finding in findings)


def test_damaged_facts_are_one_finding(model):
    (model / "model_card.json").write_text("{", "utf-8")
    (finding,) = lint(model)
    assert "truncated or not JSON" in finding


def test_a_folder_without_a_card_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is no card"):
        lint(make_model(tmp_path / "law", readme=None))
