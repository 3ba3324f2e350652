"""Cards of repos on a real Hub: lineage, licences and hashes come from there, by the unmodified client."""

import json
import textwrap

import pytest

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

from hub_moe.hubserver.pytest_plugin import hub  # noqa: F401  (for installations older than the entry point)

PREPARE = """
from huggingface_hub import HfApi
api = HfApi()
def put(repo, files, kind="model"):
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    for name, data in files.items():
        commit = api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo, repo_type=kind)
    return commit.oid
"""
CARD = """
import contextlib, io, json, sys
from hub_moe.cli.main import main
def card(*arguments):
    sys.argv = ["hub-moe", "card", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()
"""


@pytest.fixture
def run_step(hub):  # noqa: F811
    def run(code, *, with_card=False, before=""):
        parts = [before, PREPARE, CARD if with_card else "import json", textwrap.dedent(code)]
        return json.loads(hub.run_python("\n".join(parts)).splitlines()[-1])

    return run


@pytest.mark.slow  # it loads torch for the sizes
def test_a_model_on_a_hub_gets_a_card_with_its_lineage_commits_and_licences(run_step, tmp_path):
    done = run_step(
        f"""
        root = put("alice/cards-root", {{"README.md": b"---\\nlicense: gemma\\n---\\n# root\\n"}})
        base = put("alice/cards-base", {{"README.md": b"---\\nlicense: mit\\nbase_model: alice/cards-root\\n---\\n"}})
        adapter = json_adapter = ('{{"base_model_name_or_path": "alice/cards-base", "revision": "%s"}}' % base).encode()
        readme = b"---\\nlicense: apache-2.0\\n---\\n# Mine\\n\\nMy words.\\n"
        law = put("alice/cards-law", {{
            "README.md": readme, "adapter_config.json": adapter, "adapter_model.safetensors": b"weights" * 100,
        }})
        out = {str(tmp_path / "out" / "README.md")!r}
        refused = card("alice/cards-law")
        made = card("render", "alice/cards-law", "--out", out, "--json")
        print(json.dumps([base, law, refused, made]))
        """,
        with_card=True,
    )
    base, law, refused, (code, out, err) = done
    assert refused[0] == 1
    assert "say where to write its card: --out" in refused[2]
    assert code == 0, err
    facts = json.loads(out)["facts"]
    assert facts["model"] == {"name": "alice/cards-law", "kind": "adapter", "revision": law}
    assert [(each["name"], each["revision"], each["license"]) for each in facts["lineage"]] == [
        ("alice/cards-base", base, "mit"),
        ("alice/cards-root", None, "gemma"),
    ]
    assert facts["license"]["verdict"] == "compatible"
    assert len(facts["weights"]["adapter_model.safetensors"]) == 64
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# Mine\n\nMy words.\n" in text
    assert "base_model: alice/cards-base\n" in text
    assert "commit of alice/cards-root, which it was made from" in text


def test_a_card_on_a_hub_is_checked_where_it_is(run_step, tmp_path):
    from .examples import make_model, render, write_evidence

    folder = make_model(tmp_path / "law", weights=b"weights" * 100)
    write_evidence(folder / "evals", weights=b"weights" * 100)
    render(folder)
    done = run_step(
        f"""
        api.create_repo("alice/cards-checked")
        api.upload_folder(repo_id="alice/cards-checked", folder_path={str(folder)!r})
        good = card("lint", "alice/cards-checked", "--json")
        text = open({str(folder / "README.md")!r}).read().replace("0.8000", "0.9000")
        put("alice/cards-checked", {{"README.md": text.encode()}})
        bad = card("lint", "alice/cards-checked")
        old = card("lint", "alice/cards-checked@" + api.list_repo_commits("alice/cards-checked")[1].commit_id)
        print(json.dumps([good, bad, old]))
        """,
        with_card=True,
    )
    good, bad, old = done
    assert (good[0], json.loads(good[1])) == (0, [])
    assert bad[0] == 1
    assert "the block 'evaluation' differs" in bad[1]
    assert old[0] == 0, old


def test_a_base_that_is_not_there_and_a_hub_that_does_not_answer_leave_the_licence_unknown(run_step):
    code = """
    import os
    from hub_moe.cards.facts import Ancestor
    from hub_moe.cards.lineage import find_dataset_license, find_lineage
    said = []
    found = find_lineage(Ancestor("alice/nowhere", "finetune", "0" * 40), say=said.append)
    of_data = find_dataset_license("alice/nothing", None, say=said.append)
    print(json.dumps([[each.license for each in found], of_data, said]))
    """
    for before in ("", 'import os; os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"'):
        licences, of_data, said = run_step(code, before=before)
        assert (licences, of_data) == ([None], None)
        assert said[0].startswith("The card of alice/nowhere is not known: ")
        assert said[1].startswith("The licence of alice/nothing is not known: ")


def test_a_hub_that_does_not_answer_is_one_sentence(run_step):
    before = 'import os; os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"'
    code, _, err = run_step("print(json.dumps(card('lint', 'alice/base')))", before=before, with_card=True)
    assert code == 1
    assert err.startswith("Error: Cannot reach http://127.0.0.1:9 for alice/base: ")
    assert err.count("\n") == 1
