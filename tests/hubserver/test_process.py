"""A Hub for a while: it serves as long as the process that started it lives, and no longer."""

import subprocess
import sys
import time

import httpx2
import pytest

from hub_moe.errors import ConfigError
from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.store import Store

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
