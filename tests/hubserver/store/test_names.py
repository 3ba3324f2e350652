"""What may be named, and what may not."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_moe.hubserver.store.errors import InvalidInputError
from hub_moe.hubserver.store.names import RepoId, check_name, check_path, check_ref_name, check_sha256


@pytest.mark.parametrize(
    "path",
    [
        *["", ".", "..", "/etc/passwd", "a//b", "a/", "../a", "a/../b", "a/./b", "a\\b", "..\\a", "a\0b", "a\nb"],
        *[".git/config", ".GIT/config", "a/.git/hooks/x", ".git./x", ".git /x", "git~1/x", ".g\u200cit/x"],
        *["\uff0egit/x", "\u200b../x", "x" * 256, "a/" * 600 + "b", "\ud800", ".git::$INDEX_ALLOCATION/x"],
    ],
)
def test_a_path_that_could_escape_or_mislead_is_refused(path):
    with pytest.raises(InvalidInputError):
        check_path(path)


@pytest.mark.parametrize("path", ["README.md", ".gitattributes", "a b/c.txt", "データ/é.json", ".eval_results/x.yaml"])
def test_an_ordinary_path_is_kept(path):
    assert check_path(path) == path


@given(st.text())
def test_an_accepted_path_stays_inside_its_folder(path):
    try:
        check_path(path)
    except InvalidInputError:
        return
    assert os.path.normpath(os.path.join("root", path)) == os.path.join("root", *path.split("/"))
    assert ".." not in path.split("/")


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", ".a", "a--b", "a..b", "a/b", "m.git", "é", "a" * 97, "a b", "..", "a\n"]
)
def test_a_bad_name_is_refused(name):
    with pytest.raises(InvalidInputError):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "a b", "a..b", "a~1", "a.lock", ".a", "a/.b", "a//b", "/a", "a/", "@", "a@{1}", "-x", "f" * 40, "refs/x"],
)
def test_a_bad_branch_name_is_refused(name):
    with pytest.raises(InvalidInputError):
        check_ref_name(name)


@pytest.mark.parametrize("name", ["main", "feature/x", "v1.0", "é"])
def test_an_ordinary_branch_name_is_kept(name):
    assert check_ref_name(name) == name


def test_a_kind_of_repo_is_one_of_three():
    with pytest.raises(InvalidInputError, match="bucket"):
        RepoId("bucket", "alice", "x")


def test_a_sha256_is_64_lower_case_hex_digits():
    with pytest.raises(InvalidInputError):
        check_sha256("../" * 22)
