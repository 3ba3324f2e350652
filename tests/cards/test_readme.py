"""What people wrote in a README is there after every rendering, byte for byte."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_moe.cards.readme import make_block, parse_readme, read_readme
from hub_moe.errors import ConfigError

OLD = """---
# who may use it
license: mit   # decided in May
language: no
tags: [a, b]
---

# Law

Before.

<!-- hub_moe:begin summary -->
old
<!-- hub_moe:end summary -->

Between, with  two spaces.  \n
<!-- hub_moe:begin energy -->
old
<!-- hub_moe:end energy -->
After, no line break"""


@pytest.mark.parametrize(
    "text", [OLD, OLD.replace("\n", "\r\n"), "\ufeff" + OLD, "# no front matter\n", "", "---\n---\n"]
)
def test_a_readme_taken_apart_and_put_together_is_the_same(text):
    assert str(parse_readme(text)) == text


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_only_generated_blocks_are_replaced(line_break):
    text = OLD.replace("\n", line_break)
    blocks = {"summary": make_block("summary", "new\nlines"), "energy": make_block("energy", "new")}
    new = str(parse_readme(text).with_blocks(blocks))
    assert new.replace("new" + line_break + "lines", "old").replace("new", "old") == text


def test_a_new_block_comes_after_the_one_before_it_and_one_without_content_goes():
    readme = parse_readme(OLD)
    blocks = {name: make_block(name, f"about {name}") for name in ("summary", "usage", "licence")}
    new = readme.with_blocks(blocks)
    assert [part.name for part in new.parts if part.name] == ["summary", "usage", "licence"]
    assert "end summary -->\n\n<!-- hub_moe:begin usage" in str(new)
    assert str(new).count("hub_moe:begin energy") == 0
    for prose in ("Before.", "Between, with  two spaces.  \n", "After, no line break"):
        assert prose in str(new)
    assert str(parse_readme(str(new)).with_blocks(blocks)) == str(new)


def test_blocks_come_after_the_prose_of_a_readme_without_markers():
    text = str(parse_readme("# Mine\n\nwords").with_blocks({"summary": make_block("summary", "x")}))
    assert text == "# Mine\n\nwords\n\n<!-- hub_moe:begin summary -->\nx\n<!-- hub_moe:end summary -->\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab #-|\n<>!", max_size=30), min_size=1, max_size=4))
def test_any_prose_around_blocks_survives(pieces):
    text = "".join(f"{piece}\n{make_block(f'b{place}', 'old')}" for place, piece in enumerate(pieces))
    text = f"x{text}"  # not the beginning of a front matter
    new = str(
        parse_readme(text).with_blocks({f"b{place}": make_block(f"b{place}", "new") for place in range(len(pieces))})
    )
    assert new == text.replace("-->\nold\n", "-->\nnew\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<!-- hub_moe:begin a -->\n", "begins the block 'a' and never ends it"),
        ("<!-- hub_moe:end a -->\n", "ends the block 'a' which was not begun"),
        ("<!-- hub_moe:begin a -->\n<!-- hub_moe:begin b -->\n", "begins the block 'b' inside of 'a'"),
        ("<!-- hub_moe:begin a -->\n<!-- hub_moe:end b -->\n", "ends the block 'b' which was not begun"),
        (make_block("a", "x") * 2, "has the block 'a' twice"),
    ],
)
def test_markers_without_partner_nested_or_twice_are_refused(body, message):
    with pytest.raises(ConfigError, match=message):
        parse_readme(body)


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("license: [mit", "not valid YAML"),
        ("license: mit\nlicense: gpl", "the key 'license' twice"),
        ("- a\n- b", "must be a mapping"),
        ("1: 2", "must be a mapping"),
        ("date: 2026-13-45", "not valid YAML"),
        ("a: &x [1]\nb: *x", "uses an anchor"),
        ("a: !!python/object/apply:os.system ['x']", "not valid YAML"),
    ],
)
def test_a_front_matter_that_says_nothing_certain_is_refused(front_matter, message):
    with pytest.raises(ConfigError, match=message):
        parse_readme(f"---\n{front_matter}\n---\n# x\n")


def test_a_front_matter_that_never_ends_is_refused():
    with pytest.raises(ConfigError, match="no closing ---"):
        parse_readme("---\nlicense: mit\n\n# x\n")


def test_values_are_replaced_alone_and_all_other_lines_stay():
    new = parse_readme(OLD).with_metadata({"tags": ["a", "b", "c"], "license": None, "base_model": "alice/base"})
    assert new.front_matter == "# who may use it\nlanguage: no\ntags:\n- a\n- b\n- c\nbase_model: alice/base\n"


def test_equal_values_leave_the_bytes_as_they_are():
    readme = parse_readme(OLD)
    assert str(readme.with_metadata({"license": "mit", "tags": ["a", "b"]})) == OLD


def test_a_date_is_written_as_text_and_hostile_values_as_values():
    values = {"date": "2026-11-24", "name": "a: b\n---\nlicense: gpl", "x": "<!-- y -->"}
    readme = parse_readme(str(parse_readme("# x\n").with_metadata(values)))
    assert readme.metadata == values
    assert yaml.safe_load(readme.front_matter) == values
    assert readme.prose == "# x\n"


def test_a_front_matter_in_braces_is_refused_where_it_would_change():
    readme = parse_readme("---\n{license: mit}\n---\n")
    with pytest.raises(ConfigError, match="written in braces"):
        readme.with_metadata({"tags": ["a"]})


def test_a_readme_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_bytes(b"# \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_readme(path)
    with pytest.raises(OSError, match="directory"):
        read_readme(tmp_path)
