"""The `hf` command against the Hub: repos, files, discussions, pull requests, leaderboards."""

import json
import subprocess
import sys

import pytest

# One process runs all commands of a test, because each start of `hf` takes a second.
RUNNER = """
import contextlib, io, json, sys
from huggingface_hub.cli.hf import main
for line in sys.stdin:
    sys.argv, code, printed = ["hf", *json.loads(line)], 0, io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    print(json.dumps([code, printed.getvalue()]), flush=True)
"""
SCORE = "- dataset: {id: BENCHMARK, task_id: easy}\n  value: 7\n"


class Commands:
    """The `hf` commands of one user."""

    def __init__(self, hub, home, *, xet):
        environment = hub.environment(xet=xet, home=home) | {"NO_COLOR": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", RUNNER], env=environment, text=True, **pipes)

    def run(self, line, *more):
        """The exit code and everything that a command prints; `more` are arguments with spaces in them."""
        print(json.dumps([*line.split(), *map(str, more)]), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))

    def __call__(self, line, *more):
        """What a command prints that must succeed."""
        code, text = self.run(line, *more)
        assert code == 0, text
        return text

    def json(self, line, *more):
        """The JSON that a command prints."""
        text = self(f"{line} --format json", *more)
        start = min(text.find(letter) for letter in "[{" if letter in text)
        return json.JSONDecoder().raw_decode(text[start:])[0]


@pytest.fixture(scope="module", params=[False, True], ids=["http", "xet"])
def hf(request, hub, tmp_path_factory):
    """alice's commands."""
    commands = Commands(hub, tmp_path_factory.mktemp("home"), xet=request.param)
    commands.mode = "xet" if request.param else "http"
    with commands.process:
        yield commands
        commands.process.stdin.close()


@pytest.fixture
def name(hf, request):
    """A new model repo, named after the test."""
    name = f"alice/cli-{request.node.originalname[5:60].strip('_').replace('_', '-')}-{hf.mode}"
    hf(f"repos create {name}")
    return name


@pytest.fixture
def local(tmp_path):
    """A folder to upload."""
    folder = tmp_path / "up"
    (folder / "sub").mkdir(parents=True)
    (folder / "w.bin").write_bytes(bytes(range(256)) * 500)
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "sub" / "b.log").write_text("b")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [moe]\n---\n# A card\n")
    return folder


def files(hf, name):
    return [row["path"] for row in hf.json(f"models list {name} -R") if "blob_id" in row]


def test_repos_are_created_configured_moved_listed_and_deleted(hf, name):
    assert hf.run(f"repos create {name}")[0] == 1
    hf(f"repos create {name} --exist-ok")
    hf(f"repos settings {name} --private --gated manual")
    info = hf.json(f"models info {name}")
    assert (info["private"], info["gated"]) == (True, "manual")
    hf(f"repos settings {name} --public --gated false")
    hf(f"repos move {name} {name}-moved")
    assert hf.json(f"models info {name}")["id"] == f"{name}-moved"
    copy = f"{name}-copy"
    hf(f"repos duplicate {name}-moved {copy}")
    listed = {row["id"] for row in hf.json(f"repos list --search {name}")}
    assert {f"{name}-moved", copy} <= listed
    hf(f"repos delete {name}-moved --yes")
    hf(f"repos delete {copy} --yes")
    code, text = hf.run(f"models info {copy}")
    assert (code, "not found" in text.lower()) == (1, True)


def test_branches_and_tags(hf, name):
    hf(f"repos branch create {name} dev")
    hf(f"repos tag create {name} v1 --revision dev --message", "the first")
    assert "v1" in hf(f"repos tag list {name}")
    assert hf.json(f"models info {name} --revision dev")["sha"]
    hf(f"repos tag delete {name} v1 --yes")
    hf(f"repos branch delete {name} dev")
    assert hf.run(f"models info {name} --revision dev")[0] == 1


def test_files_are_uploaded_listed_copied_deleted_and_downloaded(hf, name, local, tmp_path):
    hf(f"upload {name} {local} . --exclude *.log")
    assert set(files(hf, name)) == {".gitattributes", "README.md", "sub/a.txt", "w.bin"}
    hf(f"upload {name} {local}/sub other --include *.log --delete sub/*", "--commit-message", "a message")
    hf(f"upload {name} {local}/w.bin one/w.bin --revision main")
    hf(f"cp {local}/w.bin hf://{name}/two.bin")
    hf(f"cp hf://{name}/two.bin {tmp_path}/two.bin")
    assert (tmp_path / "two.bin").read_bytes() == (local / "w.bin").read_bytes()
    if hf.mode == "xet":  # the client copies on the Hub only what came by Xet
        hf(f"cp hf://{name}/two.bin hf://{name}/three.bin")
        assert "three.bin" in files(hf, name)
    hf(f"repos delete-files {name} two.bin other/*")
    assert {"two.bin", "other/b.log"} & {*files(hf, name)} == set()
    assert "A card" in hf(f"models card {name}")
    assert "mit" in hf(f"models card {name} --metadata")
    hf(f"download {name} --include *.bin --local-dir {tmp_path}/down")
    assert {path.name for path in (tmp_path / "down").rglob("*")} >= {"w.bin", "one"}
    assert hf(f"download {name} README.md --quiet").strip().endswith("README.md")
    assert hf.run(f"download {name} missing.txt")[0] == 1
    assert name in hf("cache list --no-truncate")
    hf(f"cache verify {name}")


def test_a_pull_request_goes_from_upload_to_merge(hf, name, local):
    hf(f"upload {name} {local}/w.bin new.bin --create-pr")
    assert hf.json(f"models info {name} --revision refs/pr/1")["id"] == name
    (row,) = hf.json(f"discussions list {name} --kind pull_request")
    assert (row["num"], row["status"]) == (1, "open")
    assert "new.bin" in hf(f"discussions diff {name} 1")
    hf(f"discussions merge {name} 1 --yes --comment", "thank you")
    assert "new.bin" in files(hf, name)
    assert hf.json(f"discussions info {name} 1")["status"] == "merged"
    hf(f"repos delete-files {name} new.bin --create-pr")
    hf(f"upload {name} {local} . --create-pr")
    assert [row["num"] for row in hf.json(f"discussions list {name} --status open")] == [3, 2]


def test_a_discussion_is_opened_talked_in_renamed_closed_and_reopened(hf, name, tmp_path):
    (tmp_path / "shot.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    hf(f"discussions create {name} --title", "A question", "--body", "See", "--attach", tmp_path / "shot.png")
    assert "/uploads/" in hf(f"discussions info {name} 1")
    hf(f"discussions comment {name} 1 --body", "An answer")
    comments = [event for event in hf.json(f"discussions info {name} 1")["events"] if event["type"] == "comment"]
    hf(f"discussions edit {name} 1 {comments[1]['id']} --body", "A better answer")
    hf(f"discussions rename {name} 1", "Another title")
    hf(f"discussions close {name} 1 --yes --comment", "done")
    shown = hf.json(f"discussions info {name} 1")
    assert (shown["title"], shown["status"]) == ("Another title", "closed")
    assert "A better answer" in json.dumps(shown)
    hf(f"discussions reopen {name} 1 --yes")
    assert hf.json(f"discussions list {name} --kind discussion")[0]["status"] == "open"
    hf(f"discussions create {name} --pull-request --title", "A draft")
    assert hf.json(f"discussions info {name} 2")["status"] == "draft"


def test_datasets_benchmarks_and_their_leaderboard(hf, name, local, tmp_path):
    hf(f"repos create {name} --type dataset")
    (tmp_path / "eval.yaml").write_text("name: Sums\ntasks: [{id: easy}]\n")
    (tmp_path / "score.yaml").write_text(SCORE.replace("BENCHMARK", name))
    hf(f"upload {name} {tmp_path}/eval.yaml eval.yaml --type dataset")
    hf(f"upload {name} {local} . --type dataset")
    hf(f"upload {name} {tmp_path}/score.yaml .eval_results/sums.yaml")
    assert [row["id"] for row in hf.json(f"datasets list --filter benchmark:official --search {name}")] == [name]
    assert "benchmark:official" in hf.json(f"datasets info {name}")["tags"]
    assert "A card" in hf(f"datasets card {name}")
    (row,) = hf.json(f"datasets leaderboard {name}")
    assert (row["rank"], row["model_id"], row["value"]) == (1, name, 7)


def test_models_are_listed_and_the_user_is_known(hf, name, local):
    hf(f"upload {name} {local} .")
    for sort in ("created_at", "downloads", "last_modified", "likes", "trending_score"):
        assert name in [row["id"] for row in hf.json(f"models list --author alice --search {name} --sort {sort}")]
    assert hf.json(f"models list --filter license:mit --search {name}")[0]["id"] == name
    assert hf.json(f"models info {name} --expand likes,downloads")["likes"] == 0
    assert "alice" in hf("auth whoami")
    assert hf("env")
