"""`hub-moe find` after real reviews: an honest small gain stands above an inflated one that was rejected."""

import json
from dataclasses import replace

import pytest

from hub_moe.evals.records import read_record, write_record
from tests.anatomy.families import tiny_config

from .proposals import copy

pytestmark = [
    pytest.mark.slow,  # models are loaded and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]


def inflate(folder):
    """Let the patch's record claim more than its answers give."""
    path = next(p for p in folder.glob("evals/*.json") if "expert_patch" in p.read_text("utf-8"))
    stored = read_record(path)
    entries = tuple(
        replace(entry, metrics=tuple(replace(metric, value=0.99) for metric in entry.metrics))
        for entry in stored.record.entries
    )
    samples = stored.read_samples()
    path.unlink()
    write_record(folder / "evals", replace(stored.record, entries=entries), samples)


def test_an_honest_patch_that_was_reviewed_stands_above_an_inflated_one(world, tiny_tokenizer, tmp_path, run):
    repo, commit = world.publish_base("find-base", tiny_config("hub_moe"), tiny_tokenizer)
    honest = world.make_patch(repo, commit, "honest", {1: [0, 3]}, size=0.01)
    inflated = copy(honest, tmp_path / "inflated")
    inflate(inflated)
    numbers = [world.propose(repo, folder, name) for folder, name in ((honest, "honest"), (inflated, "inflated"))]
    for number, expected in zip(numbers, (0, 1), strict=True):
        code, out, err = run("review", f"{repo}#{number}", "--documents", "2", "--yes", "--batch-size", "4")
        assert code == expected, out + err
    code, out, err = run("find", "--base", repo, "--task", "copying", "--json")
    assert code == 0, err
    first, last = json.loads(out)["fine_tunes"]
    assert (first["name"], first["standing"]["word"], first["standing"]["by"]) == ("honest", "reproduced", "alice")
    (result,) = first["results"]
    assert result["interval"][0] <= result["difference"] <= result["interval"][1]
    assert (last["name"], last["standing"]["word"], last["results"][0]["value"]) == ("inflated", "rejected", 0.99)
    assert "numbers" in last["standing"]["reason"]
    merged = run("merge", f"{repo}#{numbers[0]}", "--yes", "--batch-size", "4", "--accept-losses")
    assert merged[0] == 0, merged
    code, out, err = run("find", "--base", repo, "--task", "copying", "--json")
    first = json.loads(out)["fine_tunes"][0]
    assert (first["kind"], first["pull_request"], first["standing"]["by"]) == ("merged patch", numbers[0], "alice")
    assert first["results"][0]["interval"] is not None
