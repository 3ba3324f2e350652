"""The tables of `evals/results/speed/README.md` and of the README, and the pictures, from the JSON of the benchmarks.

    python evals/speed/table.py

A row is a ratio with a goal. The README's table has, of each benchmark, only the rows that its file calls `headline`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evals" / "results" / "speed"
BEGIN, END = "<!-- speed: made by evals/speed/table.py -->", "<!-- /speed -->"


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results in a folder, by name."""
    return [json.loads(path.read_text("utf-8")) | {"file": path.name} for path in sorted(folder.glob("*.json"))]


def render_table(results: Iterable[Mapping[str, Any]], *, headline_only: bool = False) -> str:
    """Markdown, ending with a line break; ratios are ours over the other, so less is better."""
    rows = ["| Benchmark | Ours / other | Median (lowest to highest) | Goal | |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for key, goal in result["goals"].items():
            if headline_only and key not in result.get("headline", ()):
                continue
            each = result["ratios"][key]
            met = "met" if each["median"] <= goal else "missed"
            spread = f"{_number(each['median'])} ({_number(each['lowest'])} to {_number(each['highest'])})"
            rows.append(f"| `{result['benchmark']}` | {key} | {spread} | {_number(goal)} | {met} |")
    return "\n".join(rows) + "\n"


def _number(value: float) -> str:
    return f"{value:.3g}"


def replace_table(text: str, table: str) -> str:
    """A page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"There are no marks for the table; {BEGIN} and {END} were expected.")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def main() -> None:
    from picture import draw

    results = read_results()
    for result in results:
        draw(result).savefig((RESULTS / result["file"]).with_suffix(".png"), dpi=120)
    for path, headline_only in ((RESULTS / "README.md", False), (ROOT / "README.md", True)):
        text = replace_table(path.read_text("utf-8"), render_table(results, headline_only=headline_only))
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
