"""`hub-moe merge` on a real Hub: exact, by a method, beside the base, and everything that must stop it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from hub_moe.collaboration.gains import Gain
from hub_moe.collaboration.merge import MergeOptions, MergePlan, apply_merge, prepare_merge, refuse_losses
from hub_moe.errors import EvaluationError, HubError
from hub_moe.hub.merge_commits import MergedPatch, read_trailers
from hub_moe.hub.pull_requests import fetch_pull_request, list_files
from hub_moe.patches import ExpertPatch

pytestmark = [
    pytest.mark.slow,  # models are loaded and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
FAST = ("--yes", "--batch-size", "4")


class Cut(HfApi):
    """alice's client, whose connection breaks at one call; everything before it is the real thing."""

    def __init__(self, api, before="list_repo_refs"):
        super().__init__(endpoint=api.endpoint, token=api.token)
        self._before = before

    def list_repo_refs(self, *arguments, **options):
        if self._before == "list_repo_refs":
            raise ConnectionError("cut off")
        return super().list_repo_refs(*arguments, **options)

    def create_commit(self, *arguments, **options):
        if self._before == "create_commit":
            raise ConnectionError("cut off")
        return super().create_commit(*arguments, **options)


def quiet(_):
    """Say nothing."""


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


def test_disjoint_patches_merge_exactly_by_one_commit(repo, run):
    first, second = repo.propose("law"), repo.propose("tax")
    patches = [
        ExpertPatch.load(repo.name, f"refs/pr/{n}", f"patches/{p}") for n, p in ((first, "law"), (second, "tax"))
    ]
    code, out, err = run("merge", f"{repo.name}#{first}", f"{repo.name}#{second}", *FAST, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["method"], report["tag"], report["commit"]) == ("exact", "merge-1", repo.head())
    assert {gain["outcome"] for gain in report["gains"]} <= {"kept", "no gain shown"}
    assert {gain["patch"] for gain in report["gains"]} == {"law", "tax"}
    before, after = repo.weights(repo.commit), repo.weights("main")
    tensors = {**patches[0].tensors, **patches[1].tensors}
    assert changed(before, after) == set(tensors)
    assert all(after[name].equal(tensor) for name, tensor in tensors.items())
    commit = repo.api.list_repo_commits(repo.name)[0]
    assert read_trailers(commit.message) == [
        MergedPatch(name, patch.metadata.weights_sha256, number, "bob", repo.commit, "exact")
        for name, patch, number in zip(("law", "tax"), patches, (first, second), strict=True)
    ]
    files = list_files(repo.api, repo.name, "main")
    assert "patches/law/expert_patch.json" in files
    assert "patches/law/expert_patch.safetensors" not in files
    old = list_files(repo.api, repo.name, repo.commit)
    assert all(files[name] == old[name] for name in ("config.json", "tokenizer.json"))
    card = Path(hf_hub_download(repo.name, "README.md")).read_text("utf-8")
    assert card.startswith("---\nlicense: mit\n")
    assert "\n# Base\n\nWords.\n" in card
    assert f"| `tax` | bob | #{second} | `{repo.commit[:12]}` |" in card
    for number in (first, second):
        pull_request = fetch_pull_request(repo.api, repo.name, number)
        assert pull_request.status == "closed"
        assert f"in commit {repo.head()} (tag `merge-1`)" in pull_request.comments[-1].text
    assert [tag.name for tag in repo.api.list_repo_refs(repo.name).tags] == ["merge-1"]
    code, _, err = run("merge", f"{repo.name}#{first}", *FAST)
    assert code == 1
    assert "was merged already, by commit" in err
    code, out, err = run("merge", f"{repo.name}#{first}", f"{repo.name}#{second}", *FAST, "--json")
    done = {"state": "merged before", "commit": report["commit"]}
    assert (code, json.loads(out)) == (0, {**done, "tag": "merge-1"}), err
    code, out, err = run("merge", f"{repo.name}#{first}", f"{repo.name}#{second}", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {**done, "tag": None})
    assert "has these patches already, by commit" in err
    assert repo.head() == report["commit"]


def test_after_a_merge_the_repo_says_what_is_true_of_the_merged_weights(repo, run):
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST)
    assert code == 0, err
    old, new = (list_files(repo.api, repo.name, commit) for commit in (repo.commit, "main"))
    records = [{name for name in files if name.startswith("evals/") and name.endswith(".json")} for files in (old, new)]
    assert (len(records[0]), len(records[1]), len(records[0] & records[1])) == (1, 1, 0)
    assert len([name for name in new if name.startswith("evals/")]) == 2  # the record and its answers
    code, out, err = run("verify", repo.name, "--documents", "3", "--json")
    assert code == 0, out + err
    assert {each["outcome"] for each in json.loads(out).values()} <= {"bit-equal", "within tolerance"}
    snapshot = snapshot_download(repo.name)
    code, out, err = run("card", "lint", snapshot)
    assert code == 0, out + err
    facts = json.loads((Path(snapshot) / "model_card.json").read_text("utf-8"))
    assert facts["weights"] == {"model.safetensors": new["model.safetensors"].sha256}
    assert [evaluation["suite"] for evaluation in facts["evaluations"]] == ["offline"]


def test_a_second_merge_adds_its_row_and_replaces_the_records_again(repo, run):
    for name in ("law", "tax"):
        code, _, err = run("merge", f"{repo.name}#{repo.propose(name)}", *FAST)
        assert code == 0, err
    files = list_files(repo.api, repo.name, "main")
    assert len([name for name in files if name.startswith("evals/") and name.endswith(".json")]) == 1
    card = Path(hf_hub_download(repo.name, "README.md")).read_text("utf-8")
    assert card.count("## Merged contributions") == 1
    assert card.index("| `law` | bob |") < card.index("| `tax` | bob |")


def test_overlapping_patches_are_refused_with_a_table_and_merge_by_a_method_that_is_named(repo, run):
    both = [f"{repo.name}#{repo.propose(name, seed=seed)}" for name, seed in (("law", 1), ("rival", 2))]
    code, out, err = run("merge", *both, *FAST)
    assert code == 1
    assert "layer 1 expert 3" in out
    assert "change expert 3 of layer 1; choose how to resolve it (--method" in err
    assert repo.head() == repo.commit
    code, out, err = run("merge", *both, *FAST, "--method", "mean", "--dry-run")
    assert code == 0, err
    assert repo.head() == repo.commit
    code, out, err = run("merge", *both, *FAST, "--method", "mean", "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == "mean"
    assert {patch.method for patch in read_trailers(repo.api.list_repo_commits(repo.name)[0].message)} == {"mean"}
    chosen = {name.split(".")[5] for name in changed(repo.weights(repo.commit), repo.weights("main"))}
    assert chosen == {"0", "3", "5"}


def test_a_stale_patch_is_rebased_where_its_experts_are_untouched_and_refused_with_the_list_where_not(repo, run):
    law, tax, rival = (repo.propose(name) for name in ("law", "tax", "rival"))
    assert run("merge", f"{repo.name}#{law}", *FAST)[0] == 0
    first = repo.head()
    code, out, err = run("merge", f"{repo.name}#{tax}", *FAST)
    assert code == 0, err
    assert "rebased" in out
    assert len(changed(repo.weights(first), repo.weights("main"))) == 6
    code, out, err = run("merge", f"{repo.name}#{rival}", *FAST)
    assert code == 1
    assert "which changed what it changes: expert 3 of layer 1" in err
    assert [tag.name for tag in repo.api.list_repo_refs(repo.name).tags] == ["merge-1", "merge-2"]
    assert Path(hf_hub_download(repo.name, "README.md")).read_text("utf-8").count("| bob |") == 2


def test_side_by_side_adds_whole_patches_and_leaves_the_base_alone(repo, run):
    number = repo.propose("law")
    code, _, err = run("merge", f"{repo.name}#{number}", *FAST, "--side-by-side")
    assert code == 0, err
    assert changed(repo.weights(repo.commit), repo.weights("main")) == set()
    loaded = ExpertPatch.load(repo.name, "main", "patches/law")
    assert loaded.metadata.experts == {1: (0, 3)}
    assert read_trailers(repo.api.list_repo_commits(repo.name)[0].message)[0].method == "side-by-side"


def test_of_two_people_who_merge_at_once_one_wins_and_the_other_is_told(repo, world, tmp_path):
    first, second = repo.propose("law"), repo.propose("tax")
    plans = [
        prepare_merge(
            repo.api,
            [f"{repo.name}#{number}"],
            MergeOptions(batch_size=4),
            work=tmp_path / str(number),
            say=quiet,
            show=quiet,
        )
        for number in (first, second)
    ]
    winner = apply_merge(repo.api, plans[0], say=quiet)
    with pytest.raises(HubError, match="Somebody else committed to .* nothing was written; run the command again"):
        apply_merge(repo.api, plans[1], say=quiet)
    assert repo.head() == winner.commit
    assert repo.status(second) == "open"


def test_a_merge_that_was_cut_off_behind_its_commit_is_finished_by_the_same_command(repo, run, tmp_path):
    number = repo.propose("law")
    plan = prepare_merge(
        repo.api, [f"{repo.name}#{number}"], MergeOptions(batch_size=4), work=tmp_path / "w", say=quiet, show=quiet
    )
    cut_off = Cut(repo.api)
    with pytest.raises(HubError, match="cannot be reached"):
        apply_merge(cut_off, plan, say=quiet)
    committed = repo.head()
    assert committed != repo.commit
    assert repo.status(number) == "open"
    code, out, err = run("merge", f"{repo.name}#{number}", *FAST)
    assert (code, out.strip()) == (0, f"merge-1 {committed}"), err
    assert repo.head() == committed
    assert repo.status(number) == "closed"


def test_a_connection_that_breaks_before_the_commit_leaves_main_as_it_was(repo, run, tmp_path):
    number = repo.propose("law")
    plan = prepare_merge(
        repo.api, [f"{repo.name}#{number}"], MergeOptions(batch_size=4), work=tmp_path / "w", say=quiet, show=quiet
    )
    cut_off = Cut(repo.api, before="create_commit")
    with pytest.raises(HubError, match="cannot be reached"):
        apply_merge(cut_off, plan, say=quiet)
    assert repo.head() == repo.commit
    assert apply_merge(repo.api, plan, say=quiet).tag == "merge-1"


def test_what_must_stop_a_merge_does_before_anything_is_computed(repo, world, run):
    unreviewed = repo.propose("law", accepted=False)
    code, _, err = run("merge", f"{repo.name}#{unreviewed}", *FAST)
    assert code == 1
    assert "has reviewed its head" in err
    repo.accept(unreviewed, by=world.bob)  # a contributor's own word counts for nothing
    assert run("merge", f"{repo.name}#{unreviewed}", *FAST)[0] == 1
    repo.accept(unreviewed, verdict="reject")
    code, _, err = run("merge", f"{repo.name}#{unreviewed}", *FAST)
    assert code == 1
    assert "the review by alice says reject: it is bad" in err
    repo.accept(unreviewed)
    world.bob.upload_file(
        path_or_fileobj=b"# New words",
        path_in_repo="patches/law/README.md",
        repo_id=repo.name,
        revision=f"refs/pr/{unreviewed}",
    )
    code, _, err = run("merge", f"{repo.name}#{unreviewed}", *FAST)
    assert code == 1
    assert "has reviewed its head" in err
    world.bob.change_discussion_status(repo.name, unreviewed, "closed")
    for references, reason in [
        ([f"{repo.name}#{unreviewed}"], "is closed already"),
        ([f"{repo.name}#1", f"{repo.name}#1"], "given twice"),
        ([f"{repo.name}#1", "bob/other#1"], "on different repos"),
        (["alice/nowhere#1"], "it was deleted or renamed"),
        ([f"{repo.name}#77"], "it is not there"),
    ]:
        code, _, err = run("merge", *references, *FAST)
        assert code == 1
        assert reason in err
    assert run("merge", f"{repo.name}#1")[0] == 2
    assert repo.head() == repo.commit


def test_who_may_not_write_is_told_before_anything_is_computed(repo, world, tmp_path):
    number = repo.propose("law")
    with pytest.raises(HubError, match="you may not do this"):
        prepare_merge(world.bob, [f"{repo.name}#{number}"], MergeOptions(), work=tmp_path / "w", say=quiet, show=quiet)


def test_a_patch_without_records_merges_only_if_that_is_accepted(repo, run):
    number = repo.propose("law", with_records=False)
    code, _, err = run("merge", f"{repo.name}#{number}", *FAST)
    assert code == 1
    assert "has no record, so nothing says what it gains" in err
    code, _, err = run("merge", f"{repo.name}#{number}", *FAST, "--accept-losses")
    assert code == 0, err


def test_a_gain_is_lost_when_the_merged_model_does_not_show_it_or_is_worse():
    gain = Gain("law", "s", "t", "acc", 0.1, 0.5, 0.5, "better", "better")
    assert (gain.is_lost, gain.kept_share, gain.outcome) == (False, 1.0, "kept")
    assert replace(gain, merged=0.4, merged_verdict="tied", against_own="worse").is_lost
    assert not replace(gain, merged=0.4, merged_verdict="tied").is_lost  # too few documents to tell
    assert (replace(gain, merged=0.4).is_lost, replace(gain, merged=0.4).outcome) == (False, "kept in part (75 %)")
    assert replace(gain, merged=0.29).outcome == "lost"
    assert replace(gain, own_verdict="tied", merged_verdict="worse", merged=0.09).is_lost
    assert replace(gain, own_verdict="tied", merged_verdict="tied").outcome == "no gain shown"


def test_what_gets_worse_within_the_tolerance_is_no_loss_and_is_told():
    gain = Gain("law", "s", "t", "bits_per_byte", 2.0, 2.1, 2.05, "worse", "worse", lower_is_better=True)
    assert (gain.is_lost, gain.outcome) == (True, "lost")
    assert (replace(gain, tolerance=0.03).is_lost, replace(gain, tolerance=0.03).outcome) == (False, "costs 2.5 %")
    assert replace(gain, tolerance=0.02).is_lost
    assert replace(gain, base=0.0, merged=0.1, tolerance=0.9).is_lost


def test_a_lost_gain_refuses_the_merge(repo):
    gain = Gain("law", "s", "t", "acc", 0.1, 0.5, 0.1, "better", "tied")
    plan = MergePlan(repo.name, repo.commit, (), "exact", (), gains=(gain,))
    with pytest.raises(
        EvaluationError,
        match=r"the gain of law on t is lost \(base 0.100, alone 0.500, merged 0.100\); --accept-losses",
    ):
        refuse_losses(plan)


@pytest.mark.parametrize(
    "message",
    [
        "",
        "Merged-Patch: law weights_sha256=xyz\nPull-Request: #1\nContributor: bob\nBase-Commit: 0\nMerge-Method: exact",
        f"Merged-Patch: law weights_sha256={'0' * 64}\nPull-Request: #1\nMerge-Method: exact",
        f"Merged-Patch: law weights_sha256={'0' * 64}\nContributor: bob\nBase-Commit: 0\nMerge-Method: exact",
    ],
)
def test_trailers_that_are_not_whole_say_nothing(message):
    assert read_trailers(message) == []
