"""Real git and git-lfs against a Hub, each in a home of its own."""

import os
import shutil
import subprocess

from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults


class Git:
    """The git command as `user` (None: nobody), in a folder."""

    def __init__(self, hub, home, user="alice"):
        self.hub = hub
        self.home = home
        self.user = user
        home.mkdir(exist_ok=True)

    def url(self, repo):
        return f"{self.hub.url}/{repo}"

    def environment(self):
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.home), "GIT_CONFIG_NOSYSTEM": "1"}
        names = {"GIT_AUTHOR_NAME": "Alice", "GIT_AUTHOR_EMAIL": "alice@example.org"}
        names |= {"GIT_COMMITTER_NAME": "Alice", "GIT_COMMITTER_EMAIL": "alice@example.org"}
        kept |= names | {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_COUNT": "0", "LC_ALL": "C"}
        if self.user:
            helper = f"!f() {{ echo username=anybody; echo password={self.hub.tokens[self.user]}; }}; f"
            kept |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "credential.helper", "GIT_CONFIG_VALUE_0": helper}
        return kept

    def try_run(self, *arguments, cwd=None, content=None):
        command = ["git", *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd or self.home, env=self.environment(), input=content, capture_output=True, text=True
        )

    def run(self, *arguments, cwd=None, content=None):
        done = self.try_run(*arguments, cwd=cwd, content=content)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def clone(self, repo, folder, *options):
        self.run("clone", "-q", *options, self.url(repo), folder)
        return folder

    def commit(self, folder, files, message="m"):
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        self.run("add", "-A", cwd=folder)
        self.run("commit", "-q", "--allow-empty", "-m", message, cwd=folder)
        return self.run("rev-parse", "HEAD", cwd=folder)


def has_git_lfs():
    """Whether git-lfs is installed; where everything must be tested, its absence is an error later."""
    return shutil.which("git-lfs") is not None or bool(os.environ.get("HUB_MOE_TEST_EVERYTHING"))


def assert_whole(hub):
    """No fault anywhere in the Hub's folder."""
    with Store(hub.root) as store:
        assert list(find_faults(store)) == []


def read(client, name, path, revision="main"):
    """The answer with a file of a repo of alice's."""
    return client.send("GET", f"/alice/{name}/resolve/{revision}/{path}")


def head(client, name, revision="main"):
    """The commit id of a revision of a repo of alice's."""
    return client.send("GET", f"/api/models/alice/{name}/revision/{revision}").json()["sha"]
