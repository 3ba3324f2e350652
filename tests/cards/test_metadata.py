"""Front matter, model-index and .eval_results as the Hub's client reads them back."""

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hub_moe.cards import read_readme
from hub_moe.cards.metadata import build_eval_results, build_metadata, merge_metadata, read_entries
from hub_moe.errors import ConfigError

from .examples import COMMIT, WHOLE, make_model, render, write_evidence

TOKEN = "eyJhbGciOiJFZERTQSJ9.x.y"


@pytest.fixture
def model(tmp_path):
    folder = make_model(tmp_path / "law")
    write_evidence(folder / "evals")
    return folder


def test_the_hubs_client_reads_the_results_with_error_number_and_record(model):
    facts = render(model)
    (result,) = ModelCard.load(model / "README.md").data.eval_results
    evaluation = facts.evaluations[0]
    assert (result.metric_value, result.dataset_type, result.dataset_revision) == (0.8, "openai/gsm8k", COMMIT)
    assert result.metric_args["record_sha256"] == evaluation.record_sha256
    assert result.metric_args["n"] == 10
    assert result.metric_args["stderr"] == pytest.approx(0.1333, abs=1e-4)
    assert (result.verified, result.verify_token) == (None, None)


def test_results_for_leaderboards_are_plain_numbers_and_quoted_dates(model):
    render(model)
    text = (model / ".eval_results" / "cloze.yaml").read_text("utf-8")
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "cloze", 0.8)
    assert entry.date == "2026-11-24T12:00:00Z"
    assert "date: '2026-11-24T12:00:00Z'" in text
    assert "self-reported" in entry.notes
    assert entry.verify_token is None


@pytest.mark.parametrize("changes", [{"limit": 10}, {"dataset": "json"}])
def test_a_part_of_a_benchmark_or_a_local_file_is_no_result_for_leaderboards(tmp_path, changes):
    folder = make_model(tmp_path / "law")
    write_evidence(folder / "evals", **changes)
    render(folder)
    assert not (folder / ".eval_results").exists()
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 1


def test_what_others_put_into_the_files_stays_and_their_tokens_too(model):
    theirs = {"dataset": {"id": "openai/gsm8k", "task_id": "cloze"}, "value": 0.9, "verifyToken": TOKEN}
    (model / ".eval_results").mkdir()
    path = model / ".eval_results" / "cloze.yaml"
    path.write_text(yaml.safe_dump([theirs]), "utf-8")
    before = path.read_bytes()
    render(model)
    assert path.read_bytes() == before
    other = {"dataset": {"id": "cais/hle", "task_id": "hle"}, "value": 3, "verifyToken": TOKEN}
    path.write_text(yaml.safe_dump([other]), "utf-8")
    render(model)
    entries = read_entries(path.read_text("utf-8"), where="x")
    assert entries[0] == other
    assert [entry["value"] for entry in entries] == [3, 0.8]


@pytest.mark.parametrize("text", ["[", "a: 1", "- value: 1", "- dataset: {id: x}\n  value: 1", "- 3"])
def test_a_damaged_file_of_results_is_refused(text):
    with pytest.raises(ConfigError, match="x.yaml is not"):
        read_entries(text, where="x.yaml")


FOREIGN = {
    "task": {"type": "text-generation"},
    "dataset": {"name": "HLE", "type": "cais/hle"},
    "metrics": [{"type": "acc", "value": 0.1, "verified": True, "verifyToken": TOKEN}],
    "x-of-somebody": 1,
}


def test_foreign_results_of_a_model_index_stay_as_they_are(model):
    text = f"---\nlicense: mit\n{yaml.safe_dump({'model-index': [{'name': 'law', 'results': [FOREIGN]}]})}---\n"
    (model / "README.md").write_text(text, "utf-8")
    for _ in range(2):
        render(model)
        (index,) = read_readme(model / "README.md").metadata["model-index"]
        assert index["results"][0] == FOREIGN
        assert len(index["results"]) == 2


def test_a_model_index_of_another_form_is_refused_and_nothing_is_written(model):
    (model / "README.md").write_text("---\nmodel-index: [{name: x}]\n---\n", "utf-8")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not of the Hub's form"):
        render(model)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_people_win_and_what_an_earlier_card_wrote_is_brought_up_to_date():
    old = {"library_name": "transformers", "base_model": "alice/old", "tags": ["a", "old"], "datasets": ["x/gone"]}
    new = {"library_name": "hub_moe", "base_model": "alice/new", "tags": ["b"]}
    existing = {**old, "library_name": "mine", "tags": ["theirs", "old"], "license": "mit"}
    merged = merge_metadata(existing, new, previous={**old, "datasets": ["x/gone"], "tags": ["old"]})
    assert merged == {"base_model": "alice/new", "tags": ["theirs", "b"], "datasets": None}


def test_the_metadata_name_base_relation_and_data_only_where_they_are_known():
    metadata = build_metadata(WHOLE)
    assert metadata["base_model"] == "alice/base"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["alice/laws"]
    assert metadata["pipeline_tag"] == "text-generation"
    assert "model-index" not in metadata
    assert build_eval_results(WHOLE, {}) == {}
