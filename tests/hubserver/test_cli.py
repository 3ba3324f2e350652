"""`hub-moe hub`: its commands on a real folder, and the server as people start it."""

import json
import os
import pty
import subprocess
import sys

import pytest

pytest.importorskip("dulwich")

from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.errors import UnauthenticatedError

COMMAND = [sys.executable, "-c", "from hub_moe.cli.hub import hub; hub()"]
ASK = "import os, huggingface_hub as h; print(h.HfApi().whoami()['name'])"


def run(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)


def test_a_user_is_added_and_their_tokens_created_and_revoked(tmp_path):
    root = ("--root", tmp_path)
    assert run("user", "add", "carol", *root).stdout.startswith("hf_")
    assert run("user", "add", "lab", "--org", "--member", "carol", *root).returncode == 0
    assert run("token", "create", "carol", "--name", "laptop", "--read-only", *root).stdout.startswith("hf_")
    assert "Revoked" in run("token", "revoke", "carol", "--name", "laptop", *root).stderr
    assert run("token", "revoke", "carol", "--name", "laptop", *root).returncode == 1


def test_people_and_tokens_are_listed_and_join_organisations(tmp_path):
    root = ("--root", tmp_path)
    run("user", "add", "carol", *root)
    run("user", "add", "lab", "--org", *root)
    run("token", "create", "carol", "--name", "laptop", "--read-only", *root)
    people = json.loads(run("user", "list", "--json", *root).stdout)
    assert [(one["name"], one["kind"]) for one in people] == [("carol", "user"), ("lab", "org")]
    tokens = json.loads(run("token", "list", "carol", "--json", *root).stdout)
    assert [(one["name"], one["role"]) for one in tokens] == [("default", "write"), ("laptop", "read")]
    assert "laptop" in run("token", "list", "carol", *root).stdout
    assert "may read" in run("user", "join", "carol", "lab", "--role", "read", *root).stderr
    with Store(tmp_path) as store:
        assert store.accounts.role_in("lab", "carol") == "read"
    assert "no member of lab any more" in run("user", "leave", "carol", "lab", *root).stderr
    with Store(tmp_path) as store:
        assert store.accounts.role_in("lab", "carol") is None
    again = run("user", "leave", "carol", "lab", *root)
    assert (again.returncode, "carol is not a member of lab" in again.stderr) == (1, True)
    assert "admin, write or read" in run("user", "join", "carol", "lab", "--role", "boss", *root).stderr


def test_a_user_without_repos_is_removed_and_their_tokens_with_them(tmp_path):
    root = ("--root", tmp_path)
    token = run("user", "add", "carol", *root).stdout.strip()
    refused = run("user", "remove", "carol", *root, stdin=subprocess.DEVNULL)
    assert (refused.returncode, "needs --yes" in refused.stderr) == (2, True)
    with Store(tmp_path) as store:
        assert store.accounts.identify(token).user == "carol"
    assert "carol is removed" in run("user", "remove", "Carol", "--yes", *root).stderr
    assert json.loads(run("user", "list", "--json", *root).stdout) == []
    with Store(tmp_path) as store, pytest.raises(UnauthenticatedError):
        store.accounts.identify(token)
    again = run("user", "remove", "carol", "--yes", *root)
    assert (again.returncode, "no user or organisation named 'carol'" in again.stderr) == (1, True)


def test_who_is_removed_at_a_terminal_is_asked_for_first(tmp_path):
    run("user", "add", "carol", "--root", tmp_path)
    master, terminal = pty.openpty()
    try:
        os.write(master, b"n\ny\n")
        for answer, left in (("n", 1), ("y", 0)):
            done = run("user", "remove", "carol", "--root", tmp_path, stdin=terminal)
            assert "Remove carol?" in done.stderr, answer
            assert len(json.loads(run("user", "list", "--json", "--root", tmp_path).stdout)) == left
    finally:
        os.close(master)
        os.close(terminal)


@pytest.mark.parametrize("command", [["check"], ["user", "list"], ["token", "create", "carol"]])
def test_a_mistyped_folder_is_an_error_and_not_a_new_hub(tmp_path, command):
    done = run(*command, "--root", tmp_path / "absent")
    assert done.returncode == 1
    assert "There is no Hub in" in done.stderr
    assert not (tmp_path / "absent").exists()


def test_check_says_when_all_is_whole_and_fails_when_it_is_not(tmp_path):
    run("user", "add", "carol", "--root", tmp_path)
    done = run("check", "--root", tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    blob = tmp_path / "blobs/00/00" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_text("false")
    done = run("check", "--root", tmp_path)
    assert done.returncode == 1
    assert "large file 0000" in done.stdout


def test_serve_prints_the_line_that_points_clients_at_it(tmp_path):
    command = [*COMMAND, "serve", "--root", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        name, _, address = server.stdout.readline().strip().removeprefix("export ").partition("=")
        said = server.stderr.readline() + server.stderr.readline()
        token = said.rpartition("=")[2].strip()
        assert (name, address.rpartition(":")[0]) == ("HF_ENDPOINT", "http://127.0.0.1")
        environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
        server.terminate()
        server.wait()
    assert done.stdout.strip() == "admin", done.stderr


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--root", tmp_path / "hub", "--port", taken.getsockname()[1])
    assert "choose another --port" in done.stderr
    assert "HF_TOKEN" not in done.stderr
    assert not (tmp_path / "hub").exists()
    assert "--host is an address of this machine" in run("serve", "--root", tmp_path, "--host", "999.1.1.1").stderr


def test_gc_backup_and_restore_say_what_they_did(tmp_path):
    root = ("--root", tmp_path / "hub")
    run("user", "add", "carol", *root)
    blob = tmp_path / "hub/blobs/00/00" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(5000))
    assert run("gc", *root).stderr == "Freed 0 B.\n"
    os.utime(blob, (0, 0))
    assert "Would free 5.00 kB" in run("gc", "--dry-run", *root).stderr
    done = run("gc", "--json", *root)
    assert (json.loads(done.stdout)["sizes_bytes"], done.stderr) == ({"large files": 5000}, "Freed 5.00 kB.\n")
    done = run("backup", tmp_path / "b.tar", "--json", *root)
    assert (json.loads(done.stdout)["repos"], done.returncode) == (0, 0)
    assert "exists already" in run("backup", tmp_path / "b.tar", *root).stderr
    assert "everything is whole" in run("restore", tmp_path / "b.tar", "--root", tmp_path / "again").stderr
    assert json.loads(run("check", "--json", "--root", tmp_path / "again").stdout) == {"faults": [], "orphans": []}
    assert run("restore", tmp_path / "nothing", "--root", tmp_path / "third").returncode == 1


def test_a_second_token_leaves_the_first_alone_and_one_is_replaced_only_when_told_so(tmp_path):
    root = ("--root", tmp_path)
    first = run("user", "add", "carol", *root).stdout.strip()
    second = run("token", "create", "carol", *root).stdout.strip()
    assert "has a token named 'default' already" in run("token", "create", "carol", "--name", "default", *root).stderr
    third = run("token", "create", "carol", "--name", "default-2", "--replace", *root).stdout.strip()
    assert "cannot be empty" in run("token", "create", "carol", "--name", "", *root).stderr
    with Store(tmp_path) as store:
        assert store.accounts.identify(first).user == store.accounts.identify(third).user == "carol"
        with pytest.raises(UnauthenticatedError):
            store.accounts.identify(second)


@pytest.mark.parametrize("options", [["--member", "carol"], ["--org", "--member", "carol", "--member", "nobody"]])
def test_a_user_that_cannot_be_added_wholly_is_not_added(tmp_path, options):
    root = ("--root", tmp_path)
    run("user", "add", "carol", *root)
    assert run("user", "add", "lab", *options, *root).returncode == 1
    assert [one["name"] for one in json.loads(run("user", "list", "--json", *root).stdout)] == ["carol"]


def test_a_folder_of_something_else_is_not_made_a_hub(tmp_path):
    (tmp_path / "card.md").write_text("mine")
    for root, refusal in ((tmp_path, "holds 'card.md' and no Hub"), (tmp_path / "card.md", "is not a folder")):
        assert refusal in " ".join(run("serve", "--root", root).stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]


def test_nobody_else_on_the_machine_can_read_the_database(tmp_path):
    (tmp_path / "hub").mkdir(mode=0o755)
    with Store(tmp_path / "hub") as store:
        store.accounts.add_user("carol")
        assert {path.stat().st_mode & 0o077 for path in (tmp_path / "hub").glob("hub.sqlite3*")} == {0}
