"""The tree stays small and clean: file sizes, names, and what no file may hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_LINES_OF_A_FILE = 400
MOST_SOURCE_FILES = 250
MOST_SOURCE_FILES_OF_THE_HUB = 100
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:tmp|root|home|work|Users)/")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".json", ".txt", ".cfg", ".cpp", ".h", ""}

SOURCES = sorted((ROOT / "hub_moe").rglob("*.py"))
COMPILED = sorted(path for path in (ROOT / "hub_moe").rglob("*") if path.suffix in {".cpp", ".h"})
PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "evals").rglob("*.py"))


def _texts():
    folders = ["hub_moe", "tests", "evals", "model_cards", ".github", ".ci"]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    committed = [p for p in [*inside, *ROOT.glob("*")] if p.is_file() and p.suffix in TEXT_SUFFIXES]
    return sorted(committed)


def _name(path):
    return path.relative_to(ROOT).as_posix()


def find_blind_excepts(source):
    """Lines of `except:`, `except Exception` and `except BaseException`, alone or in a tuple."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(one) if one else "everything" for one in caught}
            if names & {"everything", "Exception", "BaseException"}:
                yield node.lineno


def find_mocks(source):
    """Lines that import a mock library, under whatever name, or ask pytest-mock for its fixture."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            dotted = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any("mock" in name.lower() for name in dotted):
                yield node.lineno
        elif isinstance(node, ast.arg) and node.arg == "mocker":
            yield node.lineno


def test_no_file_is_over_400_lines():
    lengths = {_name(path): len(path.read_text("utf-8").splitlines()) for path in [*PYTHON, *COMPILED]}
    assert {n: lines for n, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE} == {}


def test_the_package_has_at_most_250_source_files_and_the_embedded_hub_100():
    of_the_hub = [path for path in SOURCES if _name(path).startswith("hub_moe/hubserver/")]
    assert len(SOURCES) - len(of_the_hub) <= MOST_SOURCE_FILES
    assert len(of_the_hub) <= MOST_SOURCE_FILES_OF_THE_HUB


def test_no_file_or_folder_has_a_name_that_says_nothing():
    names = [_name(path.with_suffix("")) for path in [*PYTHON, *COMPILED]]
    assert [name for name in names if VAGUE_NAMES & set(re.split(r"[/_]", name))] == []


def test_no_text_holds_a_path_of_somebodys_machine():
    found = [
        f"{_name(path)}:{number}"
        for path in _texts()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_nothing_catches_every_exception():
    found = [f"{_name(p)}:{n}" for p in PYTHON for n in find_blind_excepts(p.read_text("utf-8"))]
    assert found == []


def test_nothing_is_mocked():
    found = [f"{_name(p)}:{n}" for p in PYTHON for n in find_mocks(p.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize("caught", ["", " Exception", " BaseException as e", " (OSError, Exception)"])
def test_the_check_finds_an_except_that_catches_everything(caught):
    assert list(find_blind_excepts(f"try:\n    pass\nexcept{caught}:\n    pass")) == [3]


def test_the_check_lets_a_named_exception_be_caught():
    assert list(find_blind_excepts("try:\n    pass\nexcept (OSError, KeyError):\n    pass")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import unittest.mock",
        "from unittest import mock as m",
        "from unittest.mock import patch",
        "from anywhere import MagicMock",
        "def test(mocker): ...",
    ],
)
def test_the_check_finds_a_mock(source):
    assert list(find_mocks(source)) == [1]


def test_the_check_tells_a_machine_path_from_a_url():
    folder = "home"
    assert MACHINE_PATH.search(f'open("/{folder}/me/model.txt")')
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/page")
