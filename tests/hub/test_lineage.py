"""The tree around a model, read by the real client from a real Hub."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import GitCommitInfo

from hub_moe.errors import ConfigError, HubError
from hub_moe.hub.lineage import parse_merge, read_lineage
from hub_moe.hub.lineage_outline import outline_lineage

from .village import SHA, build_village, commit, make_patch_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def village(hub):
    return build_village(hub, "lineage")


@pytest.fixture(scope="module")
def lineage(village):
    return read_lineage(village.alice, village.base)


def names(relatives):
    return {each.name: (each.relation, each.state) for each in relatives}


def texts(branch):
    return [f"{name} {about}" for _, _, name, about in branch.rows()]


def test_bases_are_followed_to_one_that_is_gone(lineage):
    (root,) = lineage.bases
    assert (root.name, root.relation, root.state) == ("alice/lineage-root", "finetune", "found")
    assert len(root.commit) == 40
    assert names(root.relatives) == {"gone/forever": ("finetune", "missing")}


def test_what_was_made_of_it_is_found_with_what_was_made_of_that(lineage):
    children = names(lineage.children)
    assert children == {"bob/lineage-tune": ("finetune", "found"), "bob/lineage-own-patch": ("finetune", "found")}
    (tune,) = [each for each in lineage.children if each.name == "bob/lineage-tune"]
    assert names(tune.relatives) == {"bob/lineage-lora": ("adapter", "found")}
    assert [each.is_expert_patch for each in lineage.children if "own" in each.name] == [True]


def test_a_patch_in_a_repo_of_its_own_names_the_commit_it_was_made_for(village):
    (base,) = read_lineage(village.bob, "bob/lineage-own-patch").bases
    assert (base.name, base.used_commit) == (village.base, village.first_commit)
    assert names(base.relatives) == {"alice/lineage-root": ("finetune", "found")}


def test_patches_in_the_repo_are_summed_up_and_a_broken_one_is_named(lineage, village):
    broken, law = lineage.patches
    assert (law.name, law.num_experts, law.num_layers, law.method) == ("law", 3, 2, "experts")
    assert (law.base, law.base_commit) == (village.base, village.first_commit)
    assert broken.name == "broken"
    assert "is not valid JSON" in broken.fault


def test_merges_are_read_from_the_trailers_of_the_owner(lineage, village):
    (merge,) = lineage.merges
    (patch,) = merge.patches
    assert (patch.name, patch.weights_sha256, patch.pull_request, patch.contributor) == ("law", SHA, 7, "bob")
    assert (merge.base_commit, merge.method, merge.authors) == (village.first_commit, "exact", ("alice",))


def test_open_contributions_have_the_last_review_of_each_and_say_whose_word_it_is(lineage, village):
    (proposed,) = lineage.proposed
    assert (proposed.pull_request.number, proposed.mark.name) == (village.number, "intent")
    ours, theirs = proposed.reviews
    assert (ours.reviewer, ours.mark.verdict, ours.counts, ours.is_current) == ("alice", "accept", True, True)
    assert (theirs.reviewer, theirs.is_author, theirs.counts, theirs.is_current) == ("bob", True, False, False)
    shown = "\n".join(texts(outline_lineage(lineage)))
    assert "alice says accept\n" in shown
    assert "bob says reject, on their own pull request, of 000000000000, which is no longer the head" in shown


def test_json_has_everything_but_what_people_said(lineage):
    found = json.loads(json.dumps(lineage.to_dict()))
    assert "comments" not in found["proposed"][0]["pull_request"]
    assert found["proposed"][0]["reviews"][0]["mark"]["verdict"] == "accept"
    assert found["patches"][1]["num_experts"] == 3


def test_a_cycle_of_bases_ends(village):
    village.add_model(village.bob, "bob/lineage-a", bases=["bob/lineage-b"])
    village.add_model(village.bob, "bob/lineage-b", bases=["bob/lineage-a", "bob/lineage-b"])
    found = read_lineage(village.bob, "bob/lineage-a")
    (base,) = found.bases
    assert set(names(base.relatives).values()) == {("merge", "repeated")}
    assert names(found.children) == {"bob/lineage-b": ("merge", "repeated")}


def test_a_private_base_is_as_one_that_is_not_there(village):
    village.add_model(village.alice, "alice/lineage-hidden")
    village.alice.update_repo_settings("alice/lineage-hidden", private=True)
    village.add_model(village.bob, "bob/lineage-of-hidden", bases=["alice/lineage-hidden"])
    assert names(read_lineage(village.bob, "bob/lineage-of-hidden").bases) == {
        "alice/lineage-hidden": ("finetune", "missing")
    }


def test_depth_and_number_are_limited_with_a_note(village):
    found = read_lineage(village.alice, village.base, depth=1)
    assert names(found.bases[0].relatives) == {"gone/forever": ("finetune", "unread")}
    assert [each.relatives for each in found.children] == [(), ()]
    assert found.notes == ("Cut at 1 generations; --depth shows more.",)
    found = read_lineage(village.alice, village.base, limit=1)
    assert len(found.patches) == 1
    assert set(found.notes) == {
        "Cut at 1 models; --limit shows more.",
        "Cut at 1 of 2 patches; --limit shows more.",
    }


def test_hostile_cards_names_and_marks_break_nothing(village):
    nasty = '---\nbase_model: ["../../etc/passwd", "a b", "<script>", "x/y\\u001b[31m"]\nself: 1\nargs: 2\n---\n'
    repo = "bob/lineage-hostile"
    village.bob.create_repo(repo)
    commit(village.bob, repo, {"README.md": nasty, "patches/\u202eevil\u0301/expert_patch.json": "[" * 100_000})
    mark = '<!-- hub_moe:contribution {"name": "x", "weights_sha256": [], "format_version": 1} -->'
    for text in (mark, f"{mark} and more", "<!-- hub_moe:contribution {" + '"a":' * 5000 + "} -->"):
        commit(village.bob, repo, {"x.txt": text}, message="Try", description=text, pr=True)
    found = read_lineage(village.bob, repo)
    assert (found.bases, found.proposed, len(found.patches)) == ((), (), 1)
    assert "is not valid JSON" in found.patches[0].fault
    assert "\u202e" not in "\n".join(texts(outline_lineage(found)))


def test_trailers_in_a_strangers_commit_are_no_merge(village):
    repo = "alice/lineage-trailers"
    village.add_model(village.alice, repo)
    text = f"Merged-Patch: evil weights_sha256={SHA}"
    number = commit(village.bob, repo, {"x.txt": "x"}, message="Fix typo", description=text, pr=True).pr_num
    village.alice.merge_pull_request(repo, number)
    found = read_lineage(village.alice, repo)
    assert found.merges == ()
    assert any("by nobody who maintains alice/lineage-trailers" in note for note in found.notes)


def test_a_patch_of_another_shape_of_metadata_is_named_with_what_is_wrong(village):
    repo = "bob/lineage-wrong"
    village.bob.create_repo(repo)
    metadata = json.loads(make_patch_json(village.base, None))
    commit(village.bob, repo, {"patches/x/expert_patch.json": json.dumps(metadata | {"experts": {"-1": [0]}})})
    (patch,) = read_lineage(village.bob, repo).patches
    assert "'experts' must map layer numbers to lists of experts" in patch.fault


def test_what_is_no_model_is_one_sentence(village):
    with pytest.raises(ConfigError, match="'base' is no id of a model"):
        read_lineage(village.alice, "base")
    with pytest.raises(HubError, match="alice/never-there is not on"):
        read_lineage(village.alice, "alice/never-there")


def make_commit(message):
    title, _, rest = message.partition("\n")
    noon = datetime(2026, 11, 24, 12, tzinfo=UTC)
    return GitCommitInfo(COMMIT, ["alice"], noon, title, rest.strip(), None, None)


def test_a_merge_of_several_patches_pairs_them_with_people_and_pull_requests():
    lines = [f"Merged-Patch: {name} weights_sha256={SHA}" for name in ("law", "intent")]
    lines += ["Pull-Request: #1", "Pull-Request: #2", "Contributor: bob", "Contributor: carol", "Merge-Method: ties"]
    merge = parse_merge(make_commit("\n".join(["Merge", "", *lines])))
    assert [(each.pull_request, each.contributor) for each in merge.patches] == [(1, "bob"), (2, "carol")]
    assert merge.method == "ties"
    each_with_its_own = parse_merge(make_commit("\n".join(["Merge", "", *lines, "Merge-Method: ties"])))
    assert each_with_its_own.method == "ties"
    mixed = parse_merge(make_commit("\n".join(["Merge", "", *lines, "Merge-Method: mean"])))
    assert mixed.method is None
    unpaired = parse_merge(make_commit("\n".join(["Merge", "", *lines[:3]])))
    assert [each.pull_request for each in unpaired.patches] == [None, None]


@pytest.mark.parametrize(
    "message",
    [
        "Merge branch",
        f"Merged-Patch: law weights_sha256={SHA}\n\nand then some prose",
        "Merge\n\nMerged-Patch: ../x weights_sha256=" + SHA,
        "Merge\n\nMerged-Patch: law weights_sha256=123",
        "Merge\n\n" + "Merged-Patch: " + "x" * 100_000,
    ],
)
def test_other_messages_are_no_merge(message):
    assert parse_merge(make_commit(message)) is None


def run_command(hub, *arguments):
    command = [sys.executable, "-m", "hub_moe", "lineage", *map(str, arguments)]
    environment = hub.environment() | {"PYTHONPATH": str(Path.cwd()), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_prints_a_tree_and_draws_it(village, hub, tmp_path):
    done = run_command(hub, village.base, "--plot", tmp_path / "tree.png")
    assert done.returncode == 0, done.stderr
    for line in ("Made from", "gone/forever", "law  3 experts in 2 layers", "#", "Merged into it", "bob/lineage-lora"):
        assert line in done.stdout
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(run_command(hub, village.base, "--json").stdout)["name"] == village.base


def test_the_command_says_in_one_sentence_what_is_wrong(hub):
    done = run_command(hub, "alice/never-there")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    for place, reason in [("nowhere/x.png", "there is no folder nowhere"), ("x.exe", "must end in .png, .svg, .pdf")]:
        done = run_command(hub, "alice/never-there", "--plot", place)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert reason in done.stderr
