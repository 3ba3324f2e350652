"""Killed at any moment, a Hub loses nothing that it acknowledged, and serves again."""

import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import count

import pytest

from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import RepoId, Store
from hub_moe.hubserver.store.check import find_faults
from hub_moe.hubserver.store.gc import collect

from .git.git_client import Git
from .xet_by_hand import XetClient as Client

ROUNDS = 12


def test_what_was_acknowledged_survives_a_kill_and_the_rest_leaves_no_trace(tmp_path):
    hub = create_hub(tmp_path / "hub", options=("--part-bytes", "200000"))
    chance = random.Random(0)
    acknowledged = {}
    hub.start()
    with Client(hub) as client:
        client.create("m")
    for round_number in range(ROUNDS):
        started = threading.Event()
        worker = threading.Thread(target=_commit_until_killed, args=(hub, round_number, acknowledged, started))
        worker.start()
        started.wait()
        worker.join(timeout=chance.uniform(0.05, 0.8))
        hub.kill()
        worker.join()
        with Store(hub.root) as store:
            assert list(find_faults(store)) == []
        hub.start()
        with Client(hub) as client:
            assert client.commit("m", {f"after/{round_number}": b"1"}).status_code == 200
    hub.stop()
    assert len(acknowledged) > ROUNDS
    with Store(hub.root) as store:
        alice = store.accounts.identify(hub.tokens["alice"])
        with store.repos.open(store.repos.find(RepoId("model", "alice", "m"), alice)) as git:
            head = git.resolve("main")
            history = {entry.oid for entry in git.log(head)}
            for path, (commit, content) in acknowledged.items():
                assert commit in history
                assert store.files.read(git, store.files.find(git, head, path)) == content


def _commit_until_killed(hub, round_number, acknowledged, started):
    with Client(hub) as client, suppress(client.broken):
        for number in count():
            path = f"{round_number}/{number}"
            content = f"{path} ".encode() * (60_000 if number % 2 else 1)
            started.set()
            if number % 4 == 3:
                answer = client.commit_by_xet("m", path, content)
            elif number % 3 == 2:
                answer = client.propose_and_merge("m", {path: content})
            else:
                answer = client.commit("m", {path: content}, as_large=number % 2 == 1)
            if answer.status_code == 200:
                commit = answer.json().get("commitOid") or answer.json()["mergeCommitId"]
                acknowledged[path] = (commit, content)


def test_what_was_pushed_or_committed_as_one_pack_survives_a_kill_and_the_rest_leaves_no_trace(tmp_path):
    hub = create_hub(tmp_path / "hub")
    chance = random.Random(1)
    acknowledged = []
    hub.start()
    with Client(hub) as client:
        client.create("m")
    for round_number in range(6):
        started = threading.Event()
        worker = threading.Thread(target=_push_until_killed, args=(hub, tmp_path / "home", acknowledged, started))
        worker.start()
        started.wait()
        worker.join(timeout=chance.uniform(0.3, 1.2))
        hub.kill()
        worker.join()
        with Store(hub.root) as store:
            assert list(find_faults(store)) == [], round_number
        hub.start()
        assert not list(hub.root.glob("repos/*/objects/tmp_*"))
    with Client(hub) as client:
        history = client.send("GET", "/api/models/alice/m/commits/main?limit=1000").json()
    hub.stop()
    assert acknowledged
    assert set(acknowledged) <= {one["id"] for one in history}


def _push_until_killed(hub, home, acknowledged, started):
    git = Git(hub, home)
    folder = home / f"{len(acknowledged)}-{hub.url.rpartition(':')[2]}"
    try:
        git.clone("alice/m", folder)
    finally:
        started.set()
    with Client(hub) as client, suppress(client.broken, AssertionError):
        for number in count():
            files = {f"{folder.name}/{number}/{one}": b"%d" % one for one in range(100)}
            if number % 2:
                answer = client.commit("m", files)
                if answer.status_code == 200:
                    acknowledged.append(answer.json()["commitOid"])
            else:
                git.run("pull", "-q", cwd=folder)
                oid = git.commit(folder, files)
                git.run("push", "-q", cwd=folder)
                acknowledged.append(oid)


@pytest.mark.parametrize("folder", ["blobs", "repos", "incoming"])
def test_a_server_starts_on_a_folder_whose_leftovers_it_can_clear(tmp_path, folder):
    hub = create_hub(tmp_path / "hub")
    (hub.root / folder).mkdir(exist_ok=True)
    hub.start()
    with Client(hub) as client:
        assert client.create("m").status_code == 200
    hub.stop()


UPLOAD_FOR_EVER = """
import itertools, random
from huggingface_hub import HfApi
api, shared = HfApi(), random.Random(0).randbytes(300_000)
for number in itertools.count():
    path, content = f"{round_number}/{{number}}.bin", random.Random(f"{round_number} {{number}}").randbytes(200_000)
    info = api.upload_file(path_or_fileobj=shared + content, path_in_repo=path, repo_id="alice/m")
    print(number, info.oid, flush=True)
"""
CLEAN_FOR_EVER = """
import sys
from pathlib import Path
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.gc import collect
with Store(Path(sys.argv[1])) as store:
    while True:
        collect(store, older_than_s=5)
        print("cleaned", flush=True)
"""


def test_hf_xet_gc_and_the_server_killed_at_any_moment_lose_nothing_that_was_acknowledged(tmp_path):
    hub, chance, acknowledged = create_hub(tmp_path / "hub"), random.Random(2), {}
    hub.start()
    with Client(hub) as client:
        client.create("m")
    for round_number in range(4):
        environment = hub.environment(xet=True)
        clean = [sys.executable, "-c", CLEAN_FOR_EVER, str(hub.root)]
        upload = [sys.executable, "-c", UPLOAD_FOR_EVER.format(round_number=round_number)]
        with (
            subprocess.Popen(clean, stdout=subprocess.PIPE, text=True) as cleaner,
            subprocess.Popen(upload, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one,
        ):
            lines = [one.stdout.readline(), cleaner.stdout.readline()]
            assert all(lines), one.stderr.read()
            time.sleep(chance.uniform(0.05, 0.8))
            victims = [hub.kill, cleaner.kill, one.kill]
            chance.shuffle(victims)
            for kill in victims:
                kill()
                time.sleep(chance.uniform(0, 0.1))
            for line in [lines[0], *one.stdout]:
                if line.endswith("\n"):
                    number, oid = line.split()
                    acknowledged[f"{round_number}/{number}.bin"] = oid
        with Store(hub.root) as store:
            assert list(find_faults(store)) == []
            assert collect(store, older_than_s=-5).skipped == []
            assert list(find_faults(store)) == []
        hub.start()
    shared = random.Random(0).randbytes(300_000)
    with Client(hub) as client:
        for path, oid in acknowledged.items():
            content = shared + random.Random(path.removesuffix(".bin").replace("/", " ")).randbytes(200_000)
            for revision in ("main", oid):
                assert client.send("GET", f"/alice/m/resolve/{revision}/{path}").content == content
    hub.stop()
    assert len(acknowledged) >= 4
