"""Tables in markdown, as many as a page can hold.

A row with too few cells is filled up, so that 60 kB of markdown can stand for a hundred million cells.
"""

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, table

MAX_CELLS = 20_000
"""How many cells all tables of a text may have together; what would have more is shown as it was written."""


def enable_tables(parser: MarkdownIt) -> None:
    """Let a parser read tables, within bounds."""
    parser.enable("table")
    parser.block.ruler.at("table", _read_table, {"alt": ["paragraph", "reference"]})


def _read_table(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """The parser's rule for a table that begins at line `first`, unless its text was refused already."""
    if first < state.env.get("no_table_before", 0):
        return False
    if silent or not table(state, first, last, True):
        return table(state, first, last, True)
    rule = state.src[state.bMarks[first + 1] : state.eMarks[first + 1]]
    columns = rule.strip(" \t|").count("|") + 1
    left = state.env.setdefault("cells_left", MAX_CELLS)
    end = first
    while end < last and not state.isEmpty(end) and (end - first) * columns <= left:
        end += 1
    if (end - first) * columns > left:
        state.env["no_table_before"] = _find_blank(state, end, last)
        return False
    state.env["cells_left"] = left - (end - first) * columns
    return bool(table(state, first, last, False))


def _find_blank(state: StateBlock, line: int, last: int) -> int:
    while line < last and not state.isEmpty(line):
        line += 1
    return line
