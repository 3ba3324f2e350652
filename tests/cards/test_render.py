"""Cards from facts: complete, honest about what is missing, and safe whatever the facts' letters are."""

import re
from dataclasses import replace

import pytest

from hub_moe.cards import Facts, render_card, render_form
from hub_moe.cards.facts import Ancestor, DatasetFacts, License, ModelFacts
from hub_moe.cards.markdown import Markdown, code, escape, fill_template
from hub_moe.cards.readme import Readme, parse_readme
from hub_moe.cards.render import find_undocumented, render_blocks
from hub_moe.errors import ConfigError

from .examples import COMMIT, WHOLE

EMPTY = Readme("", "", "", ())
HOSTILE = [
    "<script>alert(1)</script>",
    "a](javascript:alert(1)) [b",
    "x | y | z",
    "`tick` ``two``",
    "![i](http://evil.example/x.png)",
    "http://evil.example @alice www.evil.example",
    "line\nbreak\n# heading\n---",
    "<!-- hub_moe:end summary -->",
    "\n<!-- hub_moe:end training -->\n",
    "**bold** _it_ ~~s~~ $x$",
    "‮gnp.exe",
    "```\nfence",
]


def card(facts, readme=EMPTY):
    return str(render_card(facts, readme).readme)


def test_facts_come_back_from_their_json():
    assert Facts.from_dict(WHOLE.to_dict()) == WHOLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"wights": {}}, "did you mean weights"),
        ({"energy": "none"}, "must be an array"),
        ({"model": {"name": "a", "kind": "magic"}}, "expected one of"),
    ],
)
def test_damaged_facts_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        Facts.from_dict({**WHOLE.to_dict(), **change})


def test_a_card_says_what_the_facts_say():
    text = card(WHOLE)
    for part in (
        "53,904",
        "31,376",
        "`alice/base`",
        COMMIT,
        "1,724 tokens",
        "4.5588",
        "2 of 8",
        "1 min 15 s",
        "120 bytes",
    ):
        assert part in text
    assert "1.00 Wh | estimate (estimate for cpu) | 0.4000 g | 0.0200 USD" in text
    assert "0, 2, 3" in text
    assert "7 routed experts" not in text
    assert "6 routed experts in 2 layers and the shared experts (9,216 numbers)" in text


def test_a_card_rendered_again_is_the_same_and_so_is_its_front_matter():
    once = card(WHOLE)
    assert card(WHOLE, parse_readme(once)) == once


def test_nothing_but_what_is_known_is_written():
    text = card(Facts(ModelFacts("alice/law")))
    assert not re.search(r"more information|todo|tbd|none\b|nan\b|not measured", text, re.IGNORECASE)
    assert re.findall(r"hub_moe:begin (\w+)", text) == ["summary", "usage", "undocumented"][1:]
    assert text.count("- licence\n") == text.count("- training data\n") == 1


def test_what_people_wrote_about_is_not_undocumented():
    facts = Facts(ModelFacts("alice/law"))
    assert {"intended uses", "limitations, biases and risks"} <= set(find_undocumented(facts, "# Law\n"))
    missing = find_undocumented(facts, "# Law\n## Intended use\n...\n### Known limitations\n")
    assert not {"intended uses", "limitations, biases and risks"} & set(missing)
    assert "licence" in missing
    assert "licence" not in find_undocumented(replace(facts, license=License("mit")), "")


def test_missing_commits_and_counts_are_named_once():
    data = DatasetFacts("alice/laws", True)
    facts = replace(WHOLE, lineage=(Ancestor("alice/base", "finetune"),), datasets=(data, data))
    missing = find_undocumented(facts, "")
    assert missing.count("revision of the dataset alice/laws") == 1
    assert "commit of alice/base, which it was made from" in missing


@pytest.mark.parametrize("text", HOSTILE)
def test_letters_of_others_are_no_markup(text):
    markdown = (
        pytest.importorskip("markdown_it").MarkdownIt("gfm-like" if _has_linkify() else "commonmark").enable("table")
    )
    shown = markdown.render(
        f"{escape(text)} and {code(text)}\n\n| a | b |\n| --- | --- |\n| {escape(text)} | {code(text)} |\n"
    )
    assert shown.count("<td>") == 2
    assert not re.search(r"<(script|img|a|h1|strong|em|s|hr|pre)\b", shown)


def _has_linkify():
    try:
        import linkify_it  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_facts_leave_blocks_and_front_matter_whole(text):
    facts = replace(
        WHOLE,
        model=ModelFacts(text),
        lineage=(Ancestor(text, "finetune", text, text),),
        datasets=(DatasetFacts(text, True, text, text, text, 1, 1, {text: text}, text),),
        training=replace(WHOLE.training, method=text, hyperparameters={text: text}, versions={text: text}),
        weights={text: text},
    )
    readme = parse_readme(card(facts))
    assert [part.name for part in readme.parts if part.name] == list(render_blocks(facts, ""))
    assert readme.metadata.get("base_model") is None
    assert set(readme.metadata) == {"library_name", "pipeline_tag", "tags", "datasets"}
    assert str(render_card(facts, readme).readme) == str(readme)


def test_a_fact_that_is_not_there_cannot_be_written():
    with pytest.raises(TypeError, match="not known"):
        escape(None)
    assert escape(Markdown("*x*")) == "*x*"


def test_a_missing_template_is_one_sentence():
    with pytest.raises(ConfigError, match="is missing from this installation"):
        fill_template("absent.jinja", {})


def test_the_documentation_form_is_filled_as_far_as_the_facts_reach_and_claims_nothing():
    text = render_form(WHOLE)
    unknown = render_form(Facts(ModelFacts("alice/law")))
    assert f"`alice/base` at commit `{COMMIT}` (finetune)" in text
    assert "956.8 MFLOP" in text
    assert "40 documents, 1,200 tokens" in text
    assert "1.00 Wh, this run alone" in text
    assert unknown.count("[to be filled in by the provider]") > text.count("[to be filled in by the provider]") > 10
    for form in (text, unknown):
        assert "does not state that the model or its provider complies" in form
        assert not re.search(r"\bis compliant|\bcomplies with the", form)


def test_a_shape_is_called_one_and_does_not_miss_weights():
    facts = replace(Facts(ModelFacts("x/y", "architecture")), architecture=WHOLE.architecture)
    text = card(facts)
    assert "it comes with no weights" in text
    assert "hashes of the weights" not in text
    assert "from_pretrained" not in text
