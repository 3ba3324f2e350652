"""Which fine-tune is the best? Read by the real client from a real Hub, where some of them lie."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hub_moe.errors import ConfigError, HubError
from hub_moe.evals.compare import compare_records
from hub_moe.hub.fine_tunes import find_fine_tunes
from hub_moe.hub.marks import ContributionMark, write_mark

from .fair import BEFORE, BEST, BETTER, build_fair, commit, make_evidence, make_source, sha256

pytestmark = pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file")


@pytest.fixture
def fair(hub, request):
    """A base of the test's own."""
    return build_fair(hub, f"fair-{sha256(request.node.nodeid.encode())[:12]}")


@pytest.fixture
def find(tmp_path):
    def find(fair, task=None, *, api=None, **options):
        return find_fine_tunes(
            api or fair.alice,
            fair.repo,
            compare=lambda base, candidate: compare_records(base, candidate).to_dict(),
            scratch=tmp_path,
            task=task,
            **options,
        )

    return find


def standings(found):
    return [(each.name, str(each.standing)) for each in found.fine_tunes]


def test_what_was_reproduced_stands_above_larger_claims_and_what_was_rejected_comes_last(fair, find):
    fair.found()
    fair.add_model("bob/claims-more", cloze=BEST)
    fair.add_model("bob/claims-nothing")
    honest, record = fair.propose("honest")
    fair.review(honest, [record, fair.evidence[0]])
    inflated, record = fair.propose("inflated", claimed=0.99)
    fair.review(inflated, [record], verdict="reject", outcome="failed", reasons=["the answers give 0.75"])
    found = find(fair, "cloze")
    assert standings(found) == [
        ("honest", "reproduced by alice"),
        ("bob/claims-more", "self-reported"),
        ("bob/claims-nothing", "none"),
        ("inflated", "rejected by alice"),
    ]
    best, second, _, last = found.fine_tunes
    assert (best.kind, best.author, best.pull_request, best.subfolder) == (
        "proposed patch",
        "bob",
        honest,
        "patches/honest",
    )
    result = best.of_task("cloze")
    assert (result.value, result.base_value, result.gain, result.num_documents) == (0.75, 0.5, 0.25, 8)
    assert result.interval[0] < 0.25 < result.interval[1]
    assert result.verdict == "tied"
    assert second.of_task("cloze").gain == 0.5
    assert (last.of_task("cloze").value, last.standing.reason) == (0.99, "the answers give 0.75")
    assert last.of_task("cloze").standing.word == "rejected"


def test_a_task_where_lower_is_better_is_ranked_that_way(fair, find):
    costs = [2.0 + 0.1 * number for number in range(8)]
    fair.found(prose=costs)
    fair.add_model("bob/worse", prose=[each + 0.5 for each in costs])
    fair.add_model("bob/good", prose=[each - 0.2 for each in costs])
    fair.add_model("bob/better", prose=[each - 0.4 for each in costs])
    found = find(fair, "prose")
    assert [each.name for each in found.fine_tunes] == ["bob/better", "bob/good", "bob/worse"]
    results = [each.of_task("prose") for each in found.fine_tunes]
    assert [round(each.difference, 6) for each in results] == [-0.4, -0.2, 0.5]
    assert [round(each.gain, 6) for each in results] == [0.4, 0.2, -0.5]
    assert [each.verdict for each in results] == ["better", "better", "worse"]


def test_a_merged_patch_keeps_the_review_of_its_pull_request_and_the_base_it_was_made_for(fair, find):
    fair.found()
    number, record = fair.propose("law")
    fair.review(number, [record, fair.evidence[0]])
    fair.merge(number, "law")
    (law,) = find(fair, "cloze").fine_tunes
    assert (law.kind, law.pull_request, law.author, str(law.standing)) == (
        "merged patch",
        number,
        "bob",
        "reproduced by alice",
    )
    assert law.of_task("cloze").gain == 0.25


def test_a_review_counts_only_of_the_head_and_by_others_who_may_speak_for_the_base(fair, find):
    fair.found()
    stale, record = fair.propose("stale")
    fair.review(stale, [record])
    fair.bob.upload_file(
        path_or_fileobj=b"# New", path_in_repo="patches/stale/README.md", repo_id=fair.repo, revision=f"refs/pr/{stale}"
    )
    own, record = fair.propose("own")
    fair.review(own, [record], api=fair.bob)
    owners, record = fair.propose("owners", api=fair.alice)
    fair.review(owners, [record])
    fair.review(owners, [record], api=fair.bob, verdict="reject")  # a stranger's word
    assert dict(standings(find(fair, "cloze"))) == dict.fromkeys(("stale", "own", "owners"), "self-reported")


def test_a_base_that_only_the_author_vouches_for_proves_no_gain(fair, find):
    """The patch's answers were reproduced; the base's, which lie beside them and are worse than true, were not."""
    fair.found(with_record=False)
    _, beside = make_evidence(fair.source, cloze=[0] * 8)
    doubtful, record = fair.propose("doubtful", extra=beside)
    fair.review(doubtful, [record])
    sound, record = fair.propose("sound", extra=fair.evidence[1])
    fair.review(sound, [record, fair.evidence[0]])
    first, second = find(fair, "cloze").fine_tunes
    assert (first.name, first.of_task("cloze").gain) == ("sound", 0.25)
    assert (second.name, second.of_task("cloze").gain, second.of_task("cloze").value) == ("doubtful", None, 0.75)
    assert str(second.standing) == "reproduced by alice"


def test_a_record_of_other_weights_or_of_another_base_is_worth_nothing(fair, find):
    fair.found()
    _, of_others = make_evidence(make_source(b"other weights", name="model.safetensors", kind="checkpoint"), cloze=BEST)
    fair.add_model("bob/borrows", extra=of_others)
    other_base = make_source(b"another base", name="model.safetensors", kind="checkpoint")
    fair.propose("elsewhere", change=lambda record: replace(record, model=replace(record.model, base=other_base)))
    weights, record, files = fair.make_patch("swapped")
    files["expert_patch.safetensors"] = b"other weights than the record's"
    mark = ContributionMark("swapped", sha256(weights), fair.commit, [record])
    files = {f"patches/swapped/{path}": content for path, content in files.items()}
    commit(fair.bob, fair.repo, files, description=write_mark(mark), pr=True)
    found = find(fair, "cloze")
    assert standings(found) == [("elsewhere", "self-reported"), ("bob/borrows", "none"), ("swapped", "none")]
    assert found.fine_tunes[0].of_task("cloze").gain is None
    assert any("swapped" in note and "its weights are not those" in note for note in found.notes)


def test_a_copy_of_somebody_elses_record_can_spoil_nothing(fair, find):
    """A pull request with another's record beside other weights fails; the one whose record it is keeps its word."""
    fair.found()
    honest, record = fair.propose("honest")
    _, _, files = fair.make_patch("honest")
    copied = {path: content for path, content in files.items() if path.startswith("evals/")}
    trap, _ = fair.propose("trap", extra=copied)
    fair.review(trap, [record], verdict="reject", outcome="failed")
    assert dict(standings(find(fair, "cloze"))) == {"honest": "self-reported", "trap": "rejected by alice"}
    assert honest != trap


def test_a_commit_that_only_a_pull_request_has_is_no_base(fair, find):
    fair.found(with_record=False)
    files = {"model.safetensors": b"worse weights"}
    source = make_source(b"worse weights", name="model.safetensors", kind="checkpoint")
    files |= make_evidence(source, cloze=[0] * 8)[1]
    made = commit(fair.bob, fair.repo, files, pr=True)
    fair.commit = fair.alice.repo_info(fair.repo, revision=f"refs/pr/{made.pr_num}").sha
    fair.source = source
    fair._patch_json["base"]["commit"] = fair.commit
    fair.propose("sly")
    (sly,) = find(fair, "cloze").fine_tunes
    assert (sly.of_task("cloze").value, sly.of_task("cloze").gain) == (0.75, None)


def test_private_models_are_seen_by_those_who_may(fair, find):
    fair.found()
    fair.add_model("bob/hidden-tune", cloze=BETTER)
    fair.bob.update_repo_settings("bob/hidden-tune", private=True)
    assert find(fair).fine_tunes == ()
    assert [each.name for each in find(fair, api=fair.bob).fine_tunes] == ["bob/hidden-tune"]
    fair.alice.update_repo_settings(fair.repo, private=True)
    with pytest.raises(HubError, match="it was deleted or renamed, or it is private"):
        find(fair, api=fair.bob)


def with_nan(content):
    return content.replace(b'"value": 0.75', b'"value": NaN')


def with_huge_number(content):
    return content.replace(b'"value": 0.75', b'"value": 1' + b"0" * 400)


HOSTILE = {
    "not-json": lambda content: b"{",
    "edited": lambda content: content.replace(b'"value": 0.75', b'"value": 0.99'),
    "nan": with_nan,
    "huge-number": with_huge_number,
    "deep": lambda content: b'{"id":' + b"[" * 100_000,
    "endless": lambda content: content + b" " * 2_000_001,
    "latin": lambda content: b"\xff" + content,
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_record_is_left_out_and_named(fair, find, spoil):
    fair.found()
    _, files = make_evidence(make_source(b"w", name="model.safetensors", kind="checkpoint"), cloze=BETTER)
    files = {path: spoil(content) if path.endswith(".json") else content for path, content in files.items()}
    repo = f"bob/{fair.repo.partition('/')[2]}"
    fair.add_model(repo, extra={**files, "model.safetensors": b"w"})
    found = find(fair)
    assert standings(found) == [(repo, "none")]
    (note,) = found.notes
    assert note.startswith(f"{repo}/evals/")
    assert "was left out: " in note
    assert len(note) < 450


def rename(entries, **changes):
    return tuple(replace(entry, **changes) for entry in entries)


def with_value(record, value):
    (entry,) = record.entries
    metrics = (replace(entry.metrics[0], value=value),)
    return replace(record, entries=rename(record.entries, metrics=metrics))


ABSURD = {
    "no-main-metric": lambda record: replace(record, entries=rename(record.entries, main_metric="speed")),
    "entry-twice": lambda record: replace(record, entries=record.entries * 2),
    "controls": lambda record: replace(record, entries=rename(record.entries, name="\u202egnihton\x1b[2J")),
    "beyond-numbers": lambda record: with_value(record, 1e300),
    "future": lambda record: replace(record, created="tomorrow"),
    "many": lambda record: replace(record, entries=tuple(rename(record.entries, name=f"t{i}")[0] for i in range(201))),
}


@pytest.mark.parametrize("change", ABSURD.values(), ids=ABSURD)
def test_a_record_with_the_hash_that_it_claims_and_no_sense_is_left_out(fair, find, change):
    fair.found()
    fair.propose("absurd", change=change)
    found = find(fair)
    assert standings(found) == [("absurd", "none")]
    assert any("was left out: " in note for note in found.notes)


def test_answers_that_contradict_the_record_cost_the_gain_and_the_place(fair, find):
    fair.found()
    fair.add_model("bob/boasts", claimed=0.99, cloze=BETTER)
    fair.add_model("bob/modest", cloze=BETTER)
    (first,) = find(fair, "cloze", limit=1).fine_tunes
    assert first.name == "bob/modest"
    found = find(fair, "cloze")
    assert [each.name for each in found.fine_tunes] == ["bob/modest", "bob/boasts"]
    assert found.fine_tunes[1].of_task("cloze").gain is None
    assert any("bob/boasts: on cloze the answers give 0.75" in note for note in found.notes)


def test_without_a_table_of_answers_there_is_a_difference_and_no_interval(fair, find):
    fair.found()
    _, files = make_evidence(
        make_source(b"w", name="model.safetensors", kind="checkpoint"), with_table=False, cloze=BETTER
    )
    fair.add_model("bob/no-table", extra={**files, "model.safetensors": b"w"})
    found = find(fair, "cloze")
    result = found.fine_tunes[0].of_task("cloze")
    assert (result.difference, result.interval, result.verdict) == (0.25, None, None)
    assert any("No differences by document from bob/no-table" in note for note in found.notes)


@pytest.mark.parametrize("table", [b"PAR1" * 9, b""], ids=["broken", "empty"])
def test_a_table_that_is_none_is_named(fair, find, table):
    fair.found()
    source = make_source(b"w", name="model.safetensors", kind="checkpoint")
    _, files = make_evidence(source, cloze=BETTER)
    files = {path: table if path.endswith(".parquet") else content for path, content in files.items()}
    repo = f"bob/{fair.repo.partition('/')[2]}"
    fair.add_model(repo, extra={**files, "model.safetensors": b"w"})
    found = find(fair, "cloze")
    assert found.fine_tunes[0].of_task("cloze").interval is None
    assert found.notes


def test_scores_beyond_all_numbers_break_nothing(fair, find):
    fair.found()
    fair.add_model("bob/overflows", claimed=0.5, cloze=[1e308, -1e308] * 4)
    result = find(fair, "cloze").fine_tunes[0].of_task("cloze")
    assert (result.gain, result.interval) == (0.0, None) or result.gain is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_name_that_leads_elsewhere_is_asked_for_nowhere(fair, find):
    fair.found()
    for name in ("../../../alice/secret", "a/../b", "\u202ex", "x" * 500):
        mark = ContributionMark(name, "ab" * 32, fair.commit, [])
        commit(fair.bob, fair.repo, {"x.txt": b"x"}, description=write_mark(mark), pr=True)
    found = find(fair)
    assert found.fine_tunes == ()
    assert len([note for note in found.notes if "that is no name" in note]) == 4


def test_a_model_that_names_itself_as_its_base_is_not_its_own_fine_tune(fair, find):
    fair.found()
    card = f"---\nbase_model: {fair.repo}\n---\n# It\n".encode()
    commit(fair.alice, fair.repo, {"README.md": card})
    assert find(fair).fine_tunes == ()


def test_without_a_task_whoever_improves_most_tasks_goes_first_within_the_same_trust(fair, find):
    costs = [2.0 + 0.1 * number for number in range(8)]
    fair.found(cloze=BEFORE, prose=costs)
    fair.add_model("bob/one-of-two", cloze=BEST, prose=[each + 1 for each in costs])
    fair.add_model("bob/both", cloze=BETTER, prose=[each - 0.1 for each in costs])
    trusted, record = fair.propose("trusted", cloze=BETTER)
    fair.review(trusted, [record])
    found = find(fair)
    assert [each.name for each in found.fine_tunes] == ["trusted", "bob/both", "bob/one-of-two"]
    assert [each.task for each in found.fine_tunes[1].results] == ["cloze", "prose"]
    assert found.tasks == ("cloze", "prose")
    assert (found.task, found.num_found) == (None, 3)


def test_other_questions_give_no_gain(fair, find):
    fair.found()
    fair.add_model("bob/fewer-questions", cloze=BETTER[:4])
    assert find(fair, "cloze").fine_tunes[0].of_task("cloze").gain is None


def test_what_cannot_be_ranked_is_one_sentence(fair, find):
    fair.found()
    assert find(fair, "anything").fine_tunes == ()  # nothing was made of it, and that is what to say
    fair.add_model("bob/tune-of-it", cloze=BETTER)
    with pytest.raises(ConfigError, match=r"about the task 'clozes'; did you mean cloze\?"):
        find(fair, "clozes")
    with pytest.raises(ConfigError, match=r"about the task 'zzz'; there are cloze\."):
        find(fair, "zzz")
    fair.repo = "alice/never-there"
    with pytest.raises(HubError, match="alice/never-there is not on"):
        find(fair)
    fair.repo = "base"
    with pytest.raises(ConfigError, match="'base' is no id of a model"):
        find(fair)


def run_command(hub, *arguments, user="alice"):
    command = [sys.executable, "-m", "hub_moe", "find", *map(str, arguments)]
    environment = hub.environment(user) | {"PYTHONPATH": str(Path.cwd()), "COLUMNS": "200"}
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_command_prints_a_table_or_json_and_its_notes_beside(fair, hub):
    fair.found()
    number, record = fair.propose("honest")
    fair.review(number, [record])
    fair.add_model("bob/of-the-command", cloze=BEST, relation="quantized")
    done = run_command(hub, "--base", fair.repo, "--task", "cloze")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.split()[:9] == ["honest", f"#{number}", "proposed", "patch", "by", "bob", "cloze", "acc", "0.750"]
    assert "+0.250 ±0." in first
    assert first.split()[-4:] == ["8", "reproduced", "by", "alice"]
    assert second.split()[:5] == ["bob/of-the-command", "quantized", "cloze", "acc", "1.000"]
    assert "Looking at 1 models" in done.stderr
    done = run_command(hub, "--base", fair.repo, "--json", "--limit", 1)
    found = json.loads(done.stdout)
    assert [each["name"] for each in found["fine_tunes"]] == ["honest"]
    assert found["fine_tunes"][0]["results"][0]["gain"] == 0.25
    assert "Showing 1 of 2 fine-tunes; --limit shows more." in done.stderr
    assert "--task ranks by one of cloze" in done.stderr


def test_the_command_says_in_one_sentence_that_there_is_nothing_or_what_is_wrong(fair, hub):
    fair.found()
    done = run_command(hub, "--base", fair.repo)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"Nobody has made a fine-tune of {fair.repo} that you may see on this Hub.\n"
    assert json.loads(run_command(hub, "--base", fair.repo, "--json").stdout)["fine_tunes"] == []
    done = run_command(hub, "--base", "alice/never-there")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
