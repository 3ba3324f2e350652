"""The committed reference cards are what their facts give, and their facts what the configs give.

`make golden` writes them anew after a deliberate change.
"""

import json
from pathlib import Path

import pytest

from hub_moe.cards import Facts, lint_card, open_model, read_facts, render_card
from hub_moe.cards.collect import describe_footprint
from hub_moe.cards.facts import License, ModelFacts
from hub_moe.cards.readme import parse_readme, read_readme
from hub_moe.files.json_files import write_json

FOLDER = Path(__file__).parents[2] / "model_cards"
USES = {
    "hub-moe-nano": "The preset `nano` of hub_moe: it trains in minutes on two processor cores, for trying things out.",
    "deepseek-v3": "The published shape of DeepSeek-V3 (arXiv:2412.19437), for planning; see `hub-moe inspect`.",
}
LICENCES = {"hub-moe-nano": "apache-2.0", "deepseek-v3": None}


def read_config(name):
    from transformers import DeepseekV3Config

    from hub_moe.modeling import HubMoeConfig
    from hub_moe.modeling.presets import PRESETS

    return HubMoeConfig.from_preset("nano") if name == "hub-moe-nano" else DeepseekV3Config(**PRESETS[name])


def make_facts(name):
    from hub_moe.anatomy import measure_footprint

    footprint = measure_footprint(read_config(name))
    architecture = describe_footprint(footprint.to_dict(context=min(4096, footprint.max_context)))
    license = License(LICENCES[name]) if LICENCES[name] else None
    return Facts(ModelFacts(name, "architecture"), architecture=architecture, license=license)


def write_anew(name):
    facts, folder = make_facts(name), FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model_card.json", facts.to_dict())
    path = folder / "README.md"
    front = f"---\nlicense: {LICENCES[name]}\n---\n" if LICENCES[name] else ""
    text = str(render_card(facts, parse_readme(front)).readme)
    if not path.exists():
        text = text.replace("\n<!-- hub_moe:begin", f"\n## Use\n\n{USES[name]}\n\n<!-- hub_moe:begin", 1)
        path.write_text(text, "utf-8")
    path.write_text(str(render_card(facts, read_readme(path)).readme), "utf-8")


@pytest.fixture(scope="module", autouse=True)
def _update(request):
    if request.config.getoption("--update-golden"):
        for name in USES:
            write_anew(name)


@pytest.mark.parametrize("name", USES)
def test_the_facts_are_those_of_the_config(name):
    committed = json.loads((FOLDER / name / "model_card.json").read_text("utf-8"))
    assert Facts.from_dict(committed) == make_facts(name)


@pytest.mark.parametrize("name", USES)
def test_the_card_is_what_the_facts_give_byte_for_byte(name):
    path = FOLDER / name / "README.md"
    facts = read_facts(FOLDER / name)
    again = render_card(facts, read_readme(path), previous=facts)
    assert str(again.readme).encode() == path.read_bytes()
    assert again.eval_results == {}


def test_the_card_of_deepseek_v3_says_the_published_sizes():
    sizes = read_facts(FOLDER / "deepseek-v3").architecture
    assert (round(sizes.total / 1e9), round(sizes.active / 1e9)) == (671, 37)  # arXiv:2412.19437, abstract
    assert (sizes.experts, sizes.experts_per_token, sizes.layers, sizes.moe_layers) == (256, 8, 61, 58)  # section 4.2


@pytest.mark.parametrize("name", USES)
def test_the_card_has_no_finding_but_a_missing_licence(name):
    problems = [finding.problem for finding in lint_card(open_model(str(FOLDER / name)))]
    assert problems == ([] if LICENCES[name] else ["the front matter has no license"])
