"""What a repo says after a merge: of the weights that it holds now, and nothing that is true of earlier ones alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import hf_hub_download, snapshot_download

from hub_moe.cards import Evidence, collect_facts, find_evidence, open_model, read_readme, render_card
from hub_moe.cards.facts import Picture
from hub_moe.collaboration.costs import percent
from hub_moe.hub.pull_requests import list_files
from tests.cards.examples import SIZES, WHOLE, write_evidence
from tests.evals.checkpoints import evaluate

from .proposals import SPOILING, fill_spoilable, fill_with_text

pytestmark = [
    pytest.mark.slow,  # models are loaded and asked
    pytest.mark.filterwarnings("ignore:It seems that you are about to commit a data file"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
FAST = ("--yes", "--batch-size", "4")
OTHERS = {"task": {"type": "text-generation"}, "dataset": {"name": "theirs", "type": "bob/theirs"},
          "metrics": [{"type": "acc", "value": 0.5, "verifyToken": "x"}]}  # fmt: skip
FOREIGN = {"dataset": {"id": "openai/gsm8k", "task_id": "main"}, "value": 0.25, "verifyToken": "x"}
PROSE = "# My base\n\nWords above.\n"


def fill(folder):
    """A whole card: records, one of a dataset of the Hub that nobody can ask again, training, load and pictures."""
    evaluate(folder, folder / "evals", tasks=("brackets", "copying"), limit=4)
    write_evidence(folder / "evals", (folder / "model.safetensors").read_bytes())
    front = {"license": "mit", "tags": ["mine"], "model-index": [{"name": "b", "results": [OTHERS]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n{PROSE}", "utf-8")
    pictures = tuple(Picture(f"card/{about}.png", about) for about in ("training", "experts"))
    (folder / "card").mkdir()
    for each in pictures:
        (folder / each.file).write_bytes(b"\x89PNG\r\n\x1a\n")
    facts = collect_facts(open_model(str(folder)), Evidence(records=find_evidence(folder)), say=print)
    facts = replace(
        facts,
        architecture=SIZES,
        training=WHOLE.training,
        expert_load=WHOLE.expert_load,
        energy=(*WHOLE.energy, *facts.energy),
        pictures=pictures,
    )
    readme = read_readme(folder / "README.md")
    others = {"cloze.yaml": yaml.safe_dump([FOREIGN])}
    render_card(facts, readme, eval_results=others).write(folder / "README.md")
    (folder / "README.md").write_text((folder / "README.md").read_text("utf-8") + "\nWords below.\n", "utf-8")


def fetch(repo, revision="main"):
    return Path(snapshot_download(repo.name, revision=revision, ignore_patterns="*.safetensors"))


def facts_of(repo, revision="main"):
    return json.loads((fetch(repo, revision) / "model_card.json").read_text("utf-8"))


def is_record(name):
    return name.startswith("evals/") and name.endswith(".json")


def values_of(facts):
    return {result["entry"]: result["value"] for each in facts["evaluations"] for result in each["results"]}


def check(repo, run, *options):
    """Everything that the repo claims, as a stranger would: the records, then the card, on the Hub and at home."""
    code, out, err = run("verify", repo.name, "--documents", "3", "--json", *options)
    assert code == 0, out + err
    assert {each["outcome"] for each in json.loads(out).values()} <= {"bit-equal", "within tolerance"}
    for place in (repo.name, snapshot_download(repo.name)):
        code, out, err = run("card", "lint", place)
        assert code == 0, out + err


def test_what_was_measured_on_the_old_weights_goes_and_what_people_wrote_or_trained_stays(make_repo, run):
    repo = make_repo(fill)
    old, before = list_files(repo.api, repo.name, repo.commit), facts_of(repo)
    assert values_of(before).keys() == {"brackets", "copying", "cloze"}
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law', size=0.1)}", *FAST)
    assert code == 0, err
    assert [each.commit_id for each in repo.api.list_repo_commits(repo.name)][:2] == [repo.head(), repo.commit]
    new, after = list_files(repo.api, repo.name, "main"), facts_of(repo)
    assert not {name for name in old if name.startswith("evals/")} & new.keys()
    assert values_of(after).keys() == {"brackets", "copying"}
    assert [each["file"] for each in after["evaluations"]] == [Path(name).name for name in new if is_record(name)]
    assert after["weights"] == {"model.safetensors": new["model.safetensors"].sha256} != before["weights"]
    assert (after["training"], after["architecture"]) == (before["training"], before["architecture"])
    assert [each["activity"] for each in after["energy"]] == ["training", "evaluation by the suite offline"]
    assert [each["about"] for each in after["pictures"]] == ["training"]
    assert after["expert_load"] == []
    assert "card/training.png" in new
    assert "card/experts.png" not in new
    readme = read_readme(fetch(repo) / "README.md")
    assert PROSE in readme.prose
    assert readme.prose.index("Words below.") < readme.prose.index("## Merged contributions")
    assert (readme.metadata["license"], readme.metadata["tags"][0]) == ("mit", "mine")
    theirs, *ours = readme.metadata["model-index"][0]["results"]
    assert theirs == OTHERS
    assert {each["dataset"]["name"]: each["metrics"][0]["value"] for each in ours} == values_of(after)
    assert yaml.safe_load((fetch(repo) / ".eval_results" / "cloze.yaml").read_text("utf-8")) == [FOREIGN]
    check(repo, run)


def test_a_base_without_a_readme_gets_the_card_that_publish_gives(make_repo, run):
    repo = make_repo(lambda folder: evaluate(folder, folder / "evals", tasks=("brackets",), limit=4))
    repo.api.delete_file("README.md", repo.name)
    repo.commit = repo.head()
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST)
    assert code == 0, err
    readme = read_readme(fetch(repo) / "README.md")
    assert str(readme).index(f"# {repo.name}\n") < str(readme).index("## Evaluation") < str(readme).index("| `law` |")
    assert readme.block("architecture") is not None
    assert set(values_of(facts_of(repo))) == {"brackets", "copying"}


def test_a_card_written_by_hand_keeps_its_words_and_line_breaks(repo, run):
    words = b"---\r\nlicense: mit\r\n---\r\n# By hand\r\n\r\n* one\r\n* two\r\n"
    repo.api.upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id=repo.name)
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST)
    assert code == 0, err
    text = (fetch(repo) / "README.md").read_bytes()
    assert text.startswith(b"---\r\nlicense: mit\r\n")
    assert b"---\r\n# By hand\r\n\r\n* one\r\n* two\r\n" in text
    assert text.count(b"\n") == text.count(b"\r\n")
    check(repo, run)


def test_beside_each_other_base_and_patch_keep_their_records_and_numbers(make_repo, run):
    repo = make_repo(fill)
    old, before = list_files(repo.api, repo.name, repo.commit), read_readme(fetch(repo) / "README.md")
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST, "--side-by-side")
    assert code == 0, err
    new = list_files(repo.api, repo.name, "main")
    assert {name for name in old if new[name].blob != old[name].blob} == {"README.md"}
    after = read_readme(fetch(repo) / "README.md")
    assert after.metadata == before.metadata
    assert {part.name: part.text for part in before.parts if part.name} == {
        part.name: part.text for part in after.parts if part.name
    }
    assert "| `law` | bob |" in after.prose
    assert run("card", "lint", snapshot_download(repo.name))[0] == 0
    code, out, err = run("verify", repo.name, "--subfolder", "patches/law", "--documents", "2")
    assert code == 0, out + err


def test_files_that_nothing_loads_and_records_name_are_part_of_the_merged_model(repo, run):
    for name in ("training_args.bin", "notes.json"):
        repo.api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=repo.name)
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST)
    assert code == 0, err
    check(repo, run)


def test_what_cannot_be_told_truly_refuses_the_merge_before_a_model_is_asked(repo, run):
    reference = f"{repo.name}#{repo.propose('law')}"
    for name, data, reason in [
        ("pytorch_model.bin", b"old weights", "also holds pytorch_model.bin, weights that merging would leave"),
        (
            "README.md",
            b"---\nlicense: mit\n---\n<!-- hub_moe:begin usage -->\n",
            "README.md begins the block 'usage' and never ends it",
        ),
        ("model_card.json", b"{}", "model_card.json is of format version None"),
        (".eval_results/x.yaml", b"- value: 1", ".eval_results/x.yaml is not a list of results"),
        (f"evals/offline-{'0' * 16}.json", b"{}", f"evals/offline-{'0' * 16}.json"),
    ]:
        repo.api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo.name)
        head = repo.head()
        code, out, err = run("merge", reference, *FAST)
        assert (code, out) == (1, "")
        assert f"{repo.name}" in err
        assert reason in err
        assert str(Path.home()) not in err
        assert "documents" not in err
        assert repo.head() == head
        repo.api.delete_file(name, repo.name)


def test_the_bases_own_suites_are_asked_of_the_merged_model_too(make_repo, run, world, tiny_tokenizer):
    repo = make_repo(lambda folder: fill_spoilable(folder, tiny_tokenizer))
    reference = f"{repo.name}#{repo.propose('law', experts=SPOILING, size=3.0)}"
    data = ("--data-dir", world.root / "data")
    code, out, err = run("merge", reference, *FAST)
    assert (code, out) == (1, "")
    assert "--data-dir" in err
    code, out, err = run("merge", reference, *FAST, *data, "--json")
    assert code == 1, err
    gain = next(each for each in json.loads(out)["gains"] if each["task"] == "text")
    assert (gain["patch"], gain["outcome"]) == ("(the base's own)", "lost")
    assert f"text gets worse (base {gain['base']:.3f}, merged {gain['merged']:.3f}); --accept-losses" in err
    cost = gain["merged"] / gain["base"] - 1
    assert run("merge", reference, *FAST, *data, "--tolerance", cost * 0.99)[0] == 1
    assert repo.head() == repo.commit
    code, out, err = run("merge", reference, *FAST, *data, "--tolerance", 0.02, "--json")
    assert code == 0, err
    report = json.loads(out)
    note = f"Merging costs {percent(cost)} on text, within the tolerance of 2 %."
    assert (report["notes"], report["tolerance"]) == ([note], 0.02)
    comment = repo.api.get_discussion_details(repo.name, int(reference.split("#")[1])).events
    assert any(note in getattr(event, "content", "") for event in comment)
    assert values_of(facts_of(repo)).keys() == {"text", "brackets", "copying"}
    check(repo, run, *data)


def test_with_accept_losses_a_suite_of_the_base_that_cannot_be_asked_leaves_the_card(make_repo, run):
    repo = make_repo(fill_with_text)
    code, _, err = run("merge", f"{repo.name}#{repo.propose('law')}", *FAST, "--accept-losses")
    assert code == 0, err
    assert "The base's suite text was not asked, so its results leave the card: " in err
    assert values_of(facts_of(repo)).keys() == {"brackets", "copying"}
    check(repo, run)


def test_with_accept_losses_the_bases_own_suites_are_asked_where_nobody_brought_one(repo, run):
    number = repo.propose("law", with_records=False)
    code, _, err = run("merge", f"{repo.name}#{number}", *FAST, "--accept-losses")
    assert code == 0, err
    assert values_of(facts_of(repo)).keys() == {"brackets", "copying"}
    assert hf_hub_download(repo.name, "patches/law/expert_patch.json")
    check(repo, run)
