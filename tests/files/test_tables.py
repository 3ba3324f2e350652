"""TOML that is written is read back as what it was."""

import tomllib

from hub_moe.files.tables import write_toml


def test_nested_tables_and_arrays_of_tables_come_back():
    tables = {
        "description": 'with "quotes"',
        "sizes": [1, 2.5],
        "nothing": [],
        "entries": [
            {"name": "one", "tasks": ("a", "b"), "datasets": {"x/y": "abc"}, "limit": None},
            {},
            {"name": "two", "inner": [{"deep": True}, {"deep": False}]},
        ],
        "last": {"table": {"key": "value"}},
    }
    assert tomllib.loads(write_toml(tables)) == {
        **tables,
        "entries": [
            {"name": "one", "tasks": ["a", "b"], "datasets": {"x/y": "abc"}},
            {},
            {"name": "two", "inner": [{"deep": True}, {"deep": False}]},
        ],
    }
