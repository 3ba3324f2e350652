"""What all benchmarks of evals/speed share: turns, ratios, a quiet machine, and tables made from their results."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "evals" / "speed"
MODULES = ("rounds", "picture", "table")
BENCHMARKS = sorted(path.name for path in FOLDER.glob("*.py") if path.stem not in MODULES)


@pytest.fixture(scope="module")
def speed():
    """The shared modules, which import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(rounds=9, out=tmp_path / "results", even_if_busy=False)


def test_every_rival_has_its_turn_in_every_round_and_the_order_changes(speed):
    calls = []

    def rival(name):
        return lambda: calls.append(name) or {"wall": float(len(calls))}

    figures = speed.rounds.take_turns({name: rival(name) for name in ("a", "b", "c")}, rounds=20)

    assert {name: len(each) for name, each in figures.items()} == {"a": 20, "b": 20, "c": 20}
    orders = {tuple(calls[start : start + 3]) for start in range(0, 60, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 3


def test_ratios_are_taken_round_by_round(speed):
    ours, other = [{"wall": 1.0}, {"wall": 4.0}, {"wall": 3.0}], [{"wall": 2.0}, {"wall": 2.0}, {"wall": 3.0}]
    assert speed.rounds.compare(ours, other, "wall") == {"median": 1.0, "lowest": 0.5, "highest": 2.0}


def test_both_clocks_run(speed):
    times = speed.rounds.time_both(lambda: sum(range(1_000_000)))
    assert times["wall"] > 0
    assert times["processor"] > 0


def test_programs_print_their_figures_last(speed, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os; print('warming up'); print(json.dumps({'x': float(os.environ['OMP_NUM_THREADS'])}))"
    )
    figures = speed.rounds.measure_in_turns({"one": [str(program)]}, rounds=2)
    assert figures == {"one": [{"x": float(speed.rounds.THREADS)}] * 2}


def test_a_busy_machine_is_refused_unless_the_user_insists(speed, arguments):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with pytest.raises(SystemExit, match=r"Other programs take \d+% of this machine; stop them"):
            speed.rounds.require_quiet(arguments)
        arguments.even_if_busy = True
        assert speed.rounds.require_quiet(arguments) > speed.rounds.MOST_BUSY
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize(("median", "code"), [(0.5, 0), (2.0, 1)])
def test_a_report_has_ratios_goals_machine_and_picture_and_says_what_was_missed(speed, arguments, capsys, median, code):
    each = {"median": median, "lowest": 0.25, "highest": 3.0}
    with pytest.raises(SystemExit) as end:
        speed.rounds.report("example", {"a": each, "b": 0.1}, {"a": 1.0}, arguments, figures=[1, 2])
    assert end.value.code == code
    printed = capsys.readouterr()
    assert ("MISSED" in printed.err) == bool(code)
    result = json.loads(printed.out)
    assert result == json.loads((arguments.out / "example.json").read_text("utf-8"))
    assert result["ratios"] == {"a": each, "b": {"median": 0.1, "lowest": 0.1, "highest": 0.1}}
    assert result["environment"]["versions"].keys() >= {"torch", "transformers"}
    assert (result["options"]["rounds"], result["figures"]) == (9, [1, 2])
    assert (arguments.out / "example.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_has_the_rows_with_goals_and_of_headlines_only_those(speed):
    each = {"median": 0.51234, "lowest": 0.25, "highest": 3.0}
    result = {
        "benchmark": "x",
        "ratios": {"a": each, "b": each, "c": each},
        "goals": {"a": 1.0, "b": 0.5},
        "headline": ["b"],
    }
    rows = speed.table.render_table([result]).splitlines()[2:]
    assert rows == ["| `x` | a | 0.512 (0.25 to 3) | 1 | met |", "| `x` | b | 0.512 (0.25 to 3) | 0.5 | missed |"]
    assert speed.table.render_table([result], headline_only=True).splitlines()[2:] == rows[1:]


def test_a_page_without_marks_is_refused(speed):
    with pytest.raises(SystemExit, match="no marks"):
        speed.table.replace_table("# Nothing\n", "table")


@pytest.mark.parametrize(("page", "headline_only"), [("README.md", True), ("evals/results/speed/README.md", False)])
def test_the_committed_tables_are_those_of_the_committed_results(speed, page, headline_only):
    text = (ROOT / page).read_text("utf-8")
    table = speed.table.render_table(speed.table.read_results(), headline_only=headline_only)
    assert speed.table.replace_table(text, table) == text


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_how_it_is_run(name):
    done = subprocess.run([sys.executable, FOLDER / name, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"--out", "--even-if-busy"} <= set(done.stdout.replace("[", " ").replace("]", " ").split())
