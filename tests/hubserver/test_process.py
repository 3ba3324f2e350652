"""A Hub for a while: it serves as long as the process that started it lives, and no longer."""

import hashlib
import os
import resource
import subprocess
import sys
import time

import httpx2
import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults

from .client_over_http import Client

TOO_MUCH = b"weights " * 100_000
OWNER = """
import sys, time
from pathlib import Path
from hub_moe.errors import ConfigError
from hub_moe.hubserver.process import Hub
hub = Hub(Path(sys.argv[1]))
hub.start()
print(hub.url, flush=True)
time.sleep(600)
"""


def test_the_server_does_not_outlive_the_process_that_started_it(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    url = owner.stdout.readline().strip()
    assert httpx2.get(f"{url}/api/models").json() == []
    owner.kill()
    owner.communicate()
    for _ in range(100):
        try:
            with Store(tmp_path, serve=True):
                break
        except ConfigError:  # it still holds the folder
            time.sleep(0.1)
    with Hub(tmp_path).running() as hub:
        assert httpx2.get(f"{hub.url}/api/models").json() == []


def test_a_folder_that_is_served_already_is_an_error(tmp_path):
    with Store(tmp_path, serve=True), pytest.raises(RuntimeError, match="did not start"):
        Hub(tmp_path).start()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    hub = create_hub(tmp_path / "hub")
    with hub.running(), Client(hub) as client:
        client.create("m")
        assert client.commit("m", {"before": b"1" * 1000}, as_large=True).status_code == 200
        unlimited = resource.prlimit(hub.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, (500_000, unlimited[1]))  # of each file
        oid = hashlib.sha256(TOO_MUCH).hexdigest()
        upload = client.batch("m", oid, len(TOO_MUCH))["actions"]["upload"]["href"]
        refused = client.client.put(upload, content=TOO_MUCH)
        assert (refused.status_code, refused.json()["error"][:30]) == (507, "This Hub has no room left on i")
        assert client.commit("m", {"inline": os.urandom(700_000)}).status_code == 507
        resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, (1, unlimited[1]))  # not even a download can be counted
        headers = {"x-hf-download-counter": "1"}
        assert client.send("GET", "/alice/m/resolve/main/before", headers=headers).content == b"1" * 1000
        resource.prlimit(hub.pid, resource.RLIMIT_FSIZE, unlimited)
        assert client.commit("m", {"after": TOO_MUCH}, as_large=True).status_code == 200
        files = {file["path"] for file in client.send("GET", "/api/models/alice/m/tree/main").json()}
    assert files == {".gitattributes", "before", "after"}
    with Store(hub.root) as store:
        assert list(find_faults(store)) == []


def test_all_files_that_a_client_takes_at_once_are_one_download(hub):
    with Client(hub) as client:
        client.create("counted")
        client.commit("counted", {"a": b"1", "b": b"2"})
        for path in ("a", "b", "a"):
            client.send("GET", f"/alice/counted/resolve/main/{path}", headers={"x-hf-download-counter": "1"})
        assert client.send("GET", "/api/models/alice/counted").json()["downloads"] == 1
