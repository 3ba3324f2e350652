"""Long transfers through the unmodified client: many files, and uploads and downloads that are killed half-way."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hub_moe.hubserver.store import RepoId, Store

from .counting_proxy import CountingProxy

FILES = 500
FILE_BYTES = 40_000
TOTAL_BYTES = FILES * FILE_BYTES
REQUESTS_BYTES = 2_000_000  # what is said around the files themselves
UPLOAD = "from huggingface_hub import HfApi; HfApi().upload_folder(repo_id={repo!r}, folder_path={folder!r})"
DOWNLOAD = "from huggingface_hub import HfApi; HfApi().snapshot_download({repo!r}, local_dir={folder!r}, max_workers=4)"


@pytest.fixture(scope="module", params=["http", "xet"])
def mode(request):
    """How large files go."""
    return request.param


@pytest.fixture(scope="module")
def proxy(hub):
    """Between the clients and the Hub."""
    with CountingProxy(hub.url).running() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mode):
    """Many files with nothing in common."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(FILES):
        path = folder / f"part{number % 10}" / f"{number:03}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(FILE_BYTES))
    return folder


@pytest.fixture(scope="module")
def repo(hub, mode, folder, proxy, tmp_path_factory):
    """A repo whose upload was killed half-way and then done again."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    name = api.create_repo(f"alice/many-{mode}").repo_id
    home = tmp_path_factory.mktemp("home")
    command = UPLOAD.format(repo=name, folder=str(folder))
    with start(hub, proxy, command, home, mode) as client:
        count = count_stored if mode == "http" else count_committed
        wait_until(lambda: count(hub, name) >= FILES // 3 or client.poll() is not None)
        os.kill(client.pid, signal.SIGKILL)
    stored = count(hub, name)
    assert FILES // 3 <= stored < FILES
    proxy.forget()
    with start(hub, proxy, command, home, mode) as client:
        assert client.wait() == 0
    assert proxy.sent_bytes < (FILES - stored) * FILE_BYTES + REQUESTS_BYTES
    return name


def start(hub, proxy, command, home, mode):
    environment = hub.environment(xet=mode == "xet", home=home) | {"HF_ENDPOINT": proxy.url}
    return subprocess.Popen([sys.executable, "-c", command], env=environment, stderr=subprocess.DEVNULL)


def wait_until(is_done, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not is_done() and time.monotonic() < end:
        time.sleep(0.01)


def count_stored(hub, name):
    """How many large files the Hub has received for a repo: over HTTP they all go into one commit at the end."""
    with Store(hub.root) as store:
        who = store.accounts.identify(hub.tokens["alice"])
        repo = store.repos.find(RepoId("model", *name.split("/")), who)
        return len(store.database.rows("SELECT 1 FROM repo_blobs WHERE repo = ?", repo.uid))


def count_committed(hub, name):
    """How many files a repo has besides `.gitattributes`: with hf_xet the client commits 250 at a time."""
    from huggingface_hub import HfApi

    return len(HfApi(endpoint=hub.url, token=hub.tokens["alice"]).list_repo_files(name)) - 1


def read_all(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.bin")}


def test_an_upload_and_a_snapshot_that_were_killed_move_only_the_rest_and_lose_nothing(
    hub, proxy, mode, repo, folder, tmp_path
):
    target = tmp_path / "target"
    command = DOWNLOAD.format(repo=repo, folder=str(target))
    with start(hub, proxy, command, tmp_path / "home", mode) as client:
        wait_until(lambda: len(list(target.rglob("*.bin"))) >= FILES // 3 or client.poll() is not None)
        os.kill(client.pid, signal.SIGKILL)
    fetched = len(list(target.rglob("*.bin")))
    assert FILES // 3 <= fetched < FILES
    proxy.forget()
    with start(hub, proxy, command, tmp_path / "home", mode) as client:
        assert client.wait() == 0
    assert read_all(target) == read_all(folder)
    assert proxy.fetched_bytes < (FILES - fetched + 8) * FILE_BYTES + REQUESTS_BYTES
