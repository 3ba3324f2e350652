"""What a `.gitignore` leaves out: what git leaves out, and soon."""

import subprocess
import time

import pytest

from hub_moe.hubserver.store.errors import InvalidInputError
from hub_moe.hubserver.store.ignores import MAX_CHARACTERS, MAX_LINE_CHARACTERS, MAX_LINES, Ignores

PATHS = ["a", "b.txt", "a.b/c", "x/a", "x/y/a", "x/y/b.txt", "build/out/a.o", "src/build/z", "deep/1/2/end", "deep/end"]
PATHS += ["-", "]", "#h", "!n", "z", "A1", "s p", "x/y/z/keep.txt", "nested/x/y/q"]
RULES = ["a", "/a", "a/", "*.txt", "x/*", "x/**", "**/a", "**/y/*", "deep/**/end", "build/", "/build", "b?txt", "[ab]"]
RULES += [
    "[!a]",
    "[^a-y]",
    "[]-]",
    "[z-a]",
    "[",
    "[a",
    "\\#h",
    "\\!n",
    "[[:alpha:]][[:digit:]]",
    "s\\ p",
    "s p  ",
    "#h",
]
RULES += ["*\n!x/", "*.txt\n!keep.txt", "x/y\n!x/y/a", "**", "***", "x*/**/q", "*e*/x/**", "!", "/", "[[:no:]]", "\\"]


@pytest.fixture(scope="module")
def git(tmp_path_factory):
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


@pytest.mark.parametrize("rules", RULES)
def test_the_same_files_are_left_out_as_by_git(git, rules):
    (git / ".gitignore").write_text(rules)
    command = ["git", "-C", git, "check-ignore", "--no-index", "--stdin"]
    asked = "\n".join(PATHS).encode()
    found = subprocess.run(command, input=asked, capture_output=True, check=False).stdout.decode().splitlines()
    ignores = Ignores.from_client(rules)
    assert [path for path in PATHS if ignores.ignores(path)] == found


@pytest.mark.parametrize(
    "rule", ["*a" * 200 + "b", "**/" * 150 + "b", "a/**/" * 90 + "b", "[" * 500, "\\\\" * 200 + "[", "*?" * 200 + "b"]
)
def test_no_pattern_takes_long(rule):
    paths = ["a" * 250, "a/" * 120 + "a", ("a" * 120 + "/") * 8 + "a"]
    start_s = time.process_time()
    for ignores in (Ignores.from_client(rule), Ignores.from_repo(rule.encode())):
        assert not any(ignores.ignores(path) for path in paths)
    assert time.process_time() - start_s < 20


@pytest.mark.parametrize("text", ["a\n" * (MAX_LINES + 1), "a" * (MAX_LINE_CHARACTERS + 1), " " * (MAX_CHARACTERS + 1)])
def test_too_much_is_refused_from_a_client_and_left_out_of_a_repo(text):
    with pytest.raises(InvalidInputError, match="gitIgnore"):
        Ignores.from_client(text)
    assert not Ignores.from_repo(text.encode()).ignores("b")


def test_many_patterns_for_many_nested_files_are_refused_soon():
    ignores = Ignores.from_client("**/" * 20 + "b\n" + "x/y\n" * 900)
    start_s = time.process_time()
    with pytest.raises(InvalidInputError, match="too many patterns"):
        any(ignores.ignores(f"{number}/" + "a/" * 1000 + "a") for number in range(1000))
    assert time.process_time() - start_s < 60


def test_bytes_that_are_no_text_match_nothing():
    assert not Ignores.from_repo(b"\xff\xfe[\0").ignores("a")
