"""The commit that a model was read at, asked of the real client's cache."""

import json

import pytest
from huggingface_hub import HfApi

from hub_moe.environment import find_commit

pytest.importorskip("dulwich")
pytest.importorskip("starlette")

PROGRAM = """
import json
from huggingface_hub import hf_hub_download
from hub_moe.environment import find_commit
before = find_commit("alice/cached")
for revision in ("v1", None):
    hf_hub_download("alice/cached", "config.json", revision=revision)
print(json.dumps([before, find_commit("alice/cached"), find_commit("alice/cached", "v1")]))
"""


def test_a_name_a_branch_and_a_tag_stand_for_commits_once_they_were_read(hub):
    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    api.create_repo("alice/cached")
    commits = []
    for content in (b"{}", b'{"a": 1}'):
        commit = api.upload_file(repo_id="alice/cached", path_or_fileobj=content, path_in_repo="config.json")
        commits.append(commit.oid)
    api.create_tag("alice/cached", tag="v1", revision=commits[0])
    assert json.loads(hub.run_python(PROGRAM)) == [None, commits[1], commits[0]]


def test_a_path_has_no_commit(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_commit(str(tmp_path)) is None
    assert find_commit(str(tmp_path / "config.json")) is None
