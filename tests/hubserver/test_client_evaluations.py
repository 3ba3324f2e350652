"""Reported scores and leaderboards through the unmodified client."""

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hub_moe.hubserver.evaluations import parse_benchmark, parse_scores

BENCHMARK = "name: Sums\ndescription: d\nevaluation_framework: inspect-ai\ntasks:\n- id: easy\n- id: hard\n"


@pytest.fixture
def benchmark(api, repo_id):
    """A dataset that declares the tasks `easy` and `hard`."""
    api.create_repo(repo_id, repo_type="dataset")
    put(api, repo_id, "eval.yaml", BENCHMARK, repo_type="dataset")
    return repo_id


def put(api, repo_id, path, text, **options):
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo=path, repo_id=repo_id, **options)


def report(api, repo_id, benchmark, value, *, task="easy", path=".eval_results/sums.yaml", **options):
    fields = {name: options.pop(name) for name in ("notes", "source_url", "date") if name in options}
    entry = EvalResultEntry(dataset_id=benchmark, task_id=task, value=value, **fields)
    put(api, repo_id, path, yaml.safe_dump(eval_result_entries_to_yaml([entry])), **options)


def test_a_model_says_its_scores_and_those_that_are_proposed(api, bob, benchmark, repo_id):
    report(api, repo_id, benchmark, 0.5, notes="no-tools", source_url="https://x.org/log", date="2026-01-15")
    report(bob, repo_id, benchmark, 0.6, path=".eval_results/more.yaml", create_pr=True)
    put(api, repo_id, ".eval_results/broken.yaml", "- value: 1")
    results = api.model_info(repo_id, expand=["evalResults"]).eval_results
    assert [(one.value, one.notes, one.date) for one in results] == [(0.5, "no-tools", "2026-01-15"), (0.6, None, None)]
    assert (results[0].dataset_id, results[0].task_id) == (benchmark, "easy")
    assert results[0].source_url == "https://x.org/log"
    api.change_discussion_status(repo_id, 1, "closed")
    assert len(api.model_info(repo_id, expand=["evalResults"]).eval_results) == 1


def test_a_leaderboard_ranks_public_models_and_leaves_out_derived_ones(api, bob, benchmark, repo_id):
    names = {name: api.create_repo(f"{repo_id}-{name}").repo_id for name in ("low", "high", "derived", "hidden")}
    report(api, names["low"], benchmark, 1, notes="slow")
    report(api, names["high"], benchmark, 3)
    report(api, names["high"], benchmark, 2, task="hard", path=".eval_results/hard.yaml")
    report(api, names["derived"], benchmark, 9)
    put(api, names["derived"], "README.md", f"---\nbase_model: {names['low']}\n---\n")
    report(api, names["hidden"], benchmark, 8)
    api.update_repo_settings(names["hidden"], private=True)
    rows = bob.get_dataset_leaderboard(benchmark)
    assert [(row.rank, row.model_id, row.value) for row in rows] == [
        (1, names["high"], 3),
        (2, names["low"], 1),
        (1, names["high"], 2),
    ]
    assert (rows[1].notes, rows[1].verified, rows[1].author.username) == ("slow", False, "alice")
    assert rows == api.get_dataset_leaderboard(benchmark)
    all_rows = bob.get_dataset_leaderboard(benchmark, base_model_only=False)
    assert [row.model_id for row in all_rows][:2] == [names["derived"], names["high"]]


def test_a_merged_score_counts_before_a_proposed_one(api, bob, benchmark, repo_id):
    report(bob, repo_id, benchmark, 99, path=".eval_results/bob.yaml", create_pr=True)
    (row,) = api.get_dataset_leaderboard(benchmark)
    assert (row.value, row.pull_request) == (99, 1)
    report(api, repo_id, benchmark, 1)
    (row,) = api.get_dataset_leaderboard(benchmark)
    assert (row.value, row.pull_request) == (1, None)


def test_benchmarks_are_found_and_what_is_none_has_no_leaderboard(api, bob, benchmark, repo_id):
    assert [info.id for info in api.list_datasets(benchmark=True, search=repo_id)] == [benchmark]
    other = api.create_repo(f"{repo_id}-other", repo_type="dataset").repo_id
    card = ModelCard("---\ntags: ['benchmark:official']\n---\n")
    put(api, other, "README.md", str(card), repo_type="dataset")
    assert [info.id for info in api.list_datasets(filter="benchmark:official", search=repo_id)] == [benchmark]
    with pytest.raises(HfHubHTTPError, match="not a benchmark"):
        api.get_dataset_leaderboard(other)
    api.update_repo_settings(benchmark, repo_type="dataset", private=True)
    with pytest.raises(RepositoryNotFoundError):
        bob.get_dataset_leaderboard(benchmark)


@pytest.mark.parametrize(
    "text",
    [
        *["", "[]", "x", "- 1", "- {value: 1}", "- {dataset: {id: a, task_id: b}, value: 1}", "a: &x 1\nb: *x"],
        *["- {dataset: {id: a/b}, value: 1}", "- {dataset: {id: a/b, task_id: t}, value: high}", "!!bool 'x'"],
        *["- {dataset: {id: a/b, task_id: t}, value: .nan}", "- {dataset: {id: a/b, task_id: t}, value: true}"],
        "- {dataset: {id: a/b, task_id: t}, value: 1, source: {name: x}}",
        "- {dataset: {id: a/b, task_id: t}, value: 1, source: {url: 'javascript:alert(1)'}}",
        "- {dataset: {id: a/b, task_id: t}, value: 1, date: yesterday}",
    ],
)
def test_a_result_file_that_is_not_valid_says_why(text):
    (score,) = parse_scores(".eval_results/x.yaml", text)
    assert score.describe() == {"filename": ".eval_results/x.yaml", "error": score.error}
    assert score.error.startswith("Invalid evaluation results: ")


@pytest.mark.parametrize(
    "text", ["", "name: x", "name: x\ntasks: []", "tasks: [{id: a}]", "name: x\ntasks: [{id: 1}]", "{"]
)
def test_a_benchmark_needs_a_name_and_tasks(text):
    assert parse_benchmark(text) is None


def test_a_benchmark_has_the_tasks_that_it_names():
    assert parse_benchmark(BENCHMARK) == ["easy", "hard"]
    assert parse_benchmark("name: x\ntasks: [{id: a}, {id: a}]") is None
