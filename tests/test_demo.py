"""The whole loop at a size of a minute: real processes, a real Hub, real interruptions."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hub_moe.data import read_stdlib_corpus
from hub_moe.demo import DemoPlan, DemoReport, plan_demo, run_demo
from hub_moe.demo.folder import RunFolder, open_run_folder
from hub_moe.demo.forge import forge_record
from hub_moe.demo.plan import MODULES, SORTING
from hub_moe.demo.texts import make_domain_rows, write_suites
from hub_moe.errors import CheckpointError, ConfigError
from hub_moe.evals.offline_documents import make_rows, make_sorting
from hub_moe.evals.records import find_records, read_record
from hub_moe.evals.suites import load_suite
from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults

PLAN = DemoPlan(
    steps=30,
    batch_size=4,
    learning_rate=1e-2,
    vocab_size=320,
    block_length=32,
    held_out_share=0.1,
    corpus_bytes=150_000,
    model_changes={
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
    evaluations=2,
    domains=(
        dataclasses.replace(MODULES, steps=8, num_documents=6),
        dataclasses.replace(SORTING, steps=4, num_documents=40),
    ),
    rows=40,
    general_limit=4,
    reviewed_documents=20,
    tolerance=0.9,
    completion_tokens=8,
)

PROGRAM = """
import sys
from hub_moe.demo import run_demo
from hub_moe.errors import HubMoeError
from tests.test_demo import PLAN
try:
    run_demo(sys.argv[1], plan=PLAN)
except HubMoeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _start(output, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(output)],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("demo") / "run"
    process = _start(output)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def report(finished):
    return DemoReport.read(finished / "report.json")


def test_two_honest_patches_are_merged_and_a_forged_one_is_rejected_for_its_numbers(report):
    by_author = {each["author"]: each for each in report.pull_requests}
    assert {name: each["verdict"] for name, each in by_author.items()} == {
        "alice": "accept",
        "bob": "accept",
        "mallory": "reject",
    }
    assert by_author["mallory"]["claim"].endswith("-> 1.000")
    assert any("sorting-" in reason for reason in by_author["mallory"]["reasons"])
    assert {each["patch"] for each in report.gains} >= {"modules", "sorting"}
    assert report.model["tag"] == "merge-1"


def test_every_step_was_a_command_that_somebody_can_repeat(finished, report):
    said = [each["command"] for each in report.steps]
    words = {" ".join(command.split()[:2]) for command in said}
    verbs = ("train", "eval", "publish", "contribute", "review", "merge", "verify", "lineage", "find")
    assert {f"hub-moe {verb}" for verb in verbs} <= words
    assert not any(str(finished) in command for command in said)
    assert {each["who"] for each in report.steps} == {"demo", "alice", "bob", "mallory", "anybody"}
    assert len(list((finished / "logs").iterdir())) == len(said)
    exports = (finished / "people" / "alice.env").read_text("utf-8")
    assert exports.startswith("export HF_ENDPOINT=http://127.0.0.1:7860\nexport HF_TOKEN=")
    assert (finished / "people" / "alice.env").stat().st_mode & 0o077 == 0


def test_the_report_says_what_happened(finished, report):
    assert json.loads((finished / "report.json").read_text("utf-8")) == json.loads(json.dumps(report.to_dict()))
    assert set(report.bits_per_byte) == {"model", "xz -9", "gzip -9", "unigram"}
    assert all(0 < value < 10 for value in report.bits_per_byte.values())
    assert report.training["steps"] == 30
    assert report.completion.startswith(PLAN.prompt)
    assert len(report.proposal_rows()) == 3
    assert {row[0] for row in report.gain_rows()} == {"modules", "sorting"}
    assert len(report.summary_rows()) >= 8
    assert (finished / "lineage.png").read_bytes().startswith(b"\x89PNG")


def test_the_hub_of_a_run_holds_the_merged_model_its_history_and_the_pull_requests(finished, report):
    with Store(finished / "hub") as store:
        assert list(find_faults(store)) == []
    with Hub(finished / "hub").running() as hub:
        api = HfApi(endpoint=hub.url, token=False)
        model = api.model_info("demo/nano")
        assert model.sha == report.model["revision"]
        names = {file.rfilename for file in model.siblings}
        assert {"patches/modules/expert_patch.json", "patches/sorting/expert_patch.json"} <= names
        assert not any(name.startswith("patches/sorting-pro/") for name in names)
        statuses = {each.num: each.status for each in api.get_repo_discussions("demo/nano")}
        rejected = next(each["number"] for each in report.pull_requests if each["verdict"] == "reject")
        assert {number for number, status in statuses.items() if status == "open"} == {rejected}
        assert api.dataset_info("demo/python-stdlib").card_data.license == "other"


def test_a_run_that_was_killed_behind_its_merge_goes_on(finished, report, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    (output / "report.json").unlink()
    steps = json.loads((output / "steps.json").read_text("utf-8"))
    (output / "steps.json").write_text(json.dumps({name: done for name, done in steps.items() if name != "merge"}))
    again = run_demo(output, plan=PLAN)
    assert (again.model, again.completion, again.gains) == (report.model, report.completion, None)
    assert again.gain_rows() == []


def test_a_finished_run_is_only_read(finished, report, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run_demo(finished, plan=PLAN) == report
    assert "finished; --fresh starts it anew" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_with_other_settings_is_refused_and_named(finished):
    plan = dataclasses.replace(PLAN, vocab_size=300)
    with pytest.raises(ConfigError, match="plan.vocab_size is 320 there and 300 now"):
        run_demo(finished, plan=plan)


def test_ctrl_c_while_people_work_ends_their_commands_and_the_next_call_goes_on(tmp_path):
    output = tmp_path / "run"
    with _start(output) as process:
        for line in process.stderr:
            if line.startswith(("  alice: step", "  bob: step")):
                break
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not (output / "report.json").exists()
    done = json.loads((output / "steps.json").read_text("utf-8"))
    assert list(done)[:4] == ["dataset", "base", "base-eval", "publish"]
    assert not subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True).stdout.split()
    repeated = 0
    with _start(output) as process:
        for line in process.stderr:
            repeated += line.strip() == "done before"
            if line.startswith(("  alice: step", "  bob: step", "  mallory: step")):
                break
        assert process.poll() is None
        process.kill()
    assert repeated >= 4


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "base").mkdir()
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not of a demo run"):
            run_demo(tmp_path, plan=PLAN, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_fresh_removes_only_what_a_run_made(tmp_path):
    open_run_folder(tmp_path, {"plan": PLAN.to_dict()}, fresh=False)
    for name in ("base", "alice", "hub", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    open_run_folder(tmp_path, {"plan": dataclasses.replace(PLAN, vocab_size=300).to_dict()}, fresh=True)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "run.json"}


def test_no_room_is_one_sentence(tmp_path):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    process = _start(tmp_path / "run", preexec_fn=limit_file_size)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"CheckpointError: Cannot write to {tmp_path / 'run'}")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write to .*run: Not a directory"):
        run_demo(tmp_path / "file" / "run", plan=PLAN)


def test_minutes_fix_the_steps():
    one, three = plan_demo(minutes=1, seed=5), plan_demo(minutes=3, seed=5)
    assert three.steps == 3 * one.steps
    assert three.seed == 5


def test_rows_of_a_domain_hold_no_document_that_its_suite_asks_about():
    rows = make_rows("sorting", 200, seed=0)
    assert (len(rows), len(make_rows("running_text", 3, seed=0))) == (200, 3)
    assert rows != make_rows("sorting", 200, seed=1)
    asked = {row["query"] for split in make_sorting().values() for row in split}
    assert not any(query in row for row in rows for query in asked)
    with pytest.raises(ConfigError, match="no entry 'sort'; it has cloze, arithmetic"):
        make_rows("sort", 1, seed=0)


def test_a_share_of_a_domains_rows_is_the_bases_own_text():
    corpus = read_stdlib_corpus(seed=0, held_out_share=0.1, max_bytes=150_000)
    rows = [row["text"] for row in make_domain_rows(PLAN.domains[1], PLAN, corpus)]
    own, rehearsed = sum(map(len, rows[: PLAN.rows])), sum(map(len, rows[PLAN.rows :]))
    assert 0.4 < rehearsed / (own + rehearsed) < 0.7


def test_the_suites_of_the_demo_are_those_of_offline(tmp_path):
    write_suites(PLAN, tmp_path / "suites")
    general = load_suite(str(tmp_path / "suites" / "general.toml"))
    assert general.name == "general"
    assert general.entries == load_suite("offline", limit=PLAN.general_limit).entries


def test_a_forged_record_looks_whole(finished, tmp_path):
    folder = RunFolder(finished)
    honest = next(
        each for each in find_records(folder.person("bob") / "patch" / "evals") if "sorting" in each.path.name
    )
    for path in (honest.path, honest.samples_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    forged = forge_record(tmp_path / honest.path.name)
    assert not (tmp_path / honest.path.name).exists()
    assert read_record(forged.path).record.entry("sorting").metrics[0].value == 1
    assert {sample.scores["acc"] for sample in forged.read_samples()} == {1}
