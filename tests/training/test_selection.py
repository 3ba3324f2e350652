import json
from fractions import Fraction

import pytest
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import DomainProfile, ExpertProfile, LayerProfile, find_moe_layers
from hub_moe.errors import ConfigError
from hub_moe.training.routing_traces import read_traces
from hub_moe.training.selection import ExpertChoice, Scores, score_experts, select_experts
from tests.anatomy.families import tiny_config

from .esft_traces import NUM_EXPERTS, TOP_K, read_released, released_choice, released_scores, write_traces


def make_profile(*layers, top_k=2):
    """A profile of one domain from `(tokens, gate mass)` pairs."""
    parts = {index: LayerProfile(tuple(t), tuple(map(float, g))) for index, (t, g) in enumerate(layers)}
    return ExpertProfile("m", None, top_k, {"law": DomainProfile({}, sum(parts[0].tokens) // top_k, 1, parts)})


def select(*values, top_p):
    return select_experts(Scores("token", {5: values}), top_p=top_p).experts[5]


@pytest.mark.parametrize("seed", range(8))
def test_scores_and_choice_are_those_of_esfts_released_procedure(tmp_path, seed):
    folder = write_traces(tmp_path / "routing", seed)
    profile = read_traces(folder, num_experts=NUM_EXPERTS, top_k=TOP_K, domain="made up", model="m")
    expected = released_scores(folder)

    for score in ("token", "gate"):
        assert score_experts(profile, score=score).layers == expected[score]
    for top_p in (0.1, 0.2, 0.5, 0.9):
        choice = select_experts(score_experts(profile, score="token"), top_p=top_p)
        assert choice == ExpertChoice(released_choice(expected["token"], top_p))


def test_the_released_traces_of_every_task_give_the_released_scores_and_choice(shared_data):
    for task in sorted((shared_data / "esft").iterdir()):
        profile = read_traces(task / "routing", num_experts=64, top_k=6, domain=task.name, model="m")
        scores, config = read_released(task)

        assert sorted(profile.domain().layers) == list(range(1, 27))
        for score in ("token", "gate"):
            assert score_experts(profile, score=score).layers == scores[score], (task.name, score)
        choice = select_experts(score_experts(profile, score="token"), top_p=0.2)
        assert choice.to_dict() == config, task.name
        assert choice == ExpertChoice.load(task / "expert_config.json")


def test_experts_are_taken_until_their_scores_reach_top_p():
    assert select(0.1, 0.4, 0.2, 0.3, top_p=0.7) == [1, 3]
    assert select(0.1, 0.4, 0.2, 0.3, top_p=0.71) == [1, 3, 2]
    assert select(0.1, 0.4, 0.2, 0.3, top_p=0.01) == [1]


def test_of_equal_scores_the_lower_id_comes_first():
    assert select(0.1, 0.3, 0.1, 0.3, 0.1, 0.1, top_p=0.7) == [1, 3, 0]


def test_sums_are_floats_as_in_esft_so_that_a_decimal_tie_may_take_one_more():
    assert Fraction("0.1498") + Fraction("0.0501") + Fraction("0.0001") == Fraction("0.2")
    assert select(0.8, 0.1498, 0.0501, 0.0001, top_p=0.9) == [0, 1]
    assert select(0.0, 0.1498, 0.0501, 0.0001, top_p=0.2) == [1, 2, 3, 0]
    assert select(0.0, 0.1, 0.05, 0.05, top_p=0.2) == [1, 2, 3]


def test_top_p_of_one_takes_every_expert_whatever_rounding_left():
    assert select(0.3333, 0.3333, 0.3333, top_p=1.0) == [0, 1, 2]
    assert select(0.5, 0.5, 0.0, top_p=1.0) == [0, 1]


def test_a_score_between_two_roundings_falls_where_esfts_adding_one_by_one_puts_it():
    profile = make_profile(([51, 107, 107, 107, 108], [1] * 5), top_k=6)

    assert Fraction(51, 480) * 10_000 == Fraction(2125, 2)
    assert round(51 / 480, 4) == 0.1062
    assert score_experts(profile, score="token").layers[0][0] == 0.1063


def test_scores_are_rounded_to_four_decimals_unless_asked_otherwise():
    profile = make_profile(([1, 2, 4, 0], [0.7, 0.6, 0.4, 0.0]))

    assert score_experts(profile, score="token").layers[0] == [0.1429, 0.2857, 0.5714, 0.0]
    assert score_experts(profile, score="token", decimals=None).layers[0] == pytest.approx([1 / 7, 2 / 7, 4 / 7, 0])
    assert score_experts(profile, score="gate", decimals=2).layers[0] == [0.2, 0.17, 0.11, 0.0]


def test_normalised_scores_add_up_to_one_whatever_the_router_scales():
    profile = make_profile(([4, 4], [5.0, 15.0]))
    plain, normalised = (score_experts(profile, score="gate", normalise=wanted) for wanted in (False, True))

    assert plain.layers[0] == [1.25, 3.75]
    assert normalised.layers[0] == [0.25, 0.75]


def test_a_share_takes_the_highest_scores_of_all_layers_together():
    scores = Scores("token", {1: [0.1, 0.5, 0.4], 2: [0.3, 0.4, 0.3], 4: [0.2, 0.2, 0.6]})
    # of equal scores the lower id comes first, ...
    assert select_experts(scores, share=3 / 9).experts == {1: [1], 2: [1], 4: [2]}
    assert select_experts(scores, share=4 / 9).experts == {1: [1, 2], 2: [1], 4: [2]}
    assert select_experts(scores, share=0.001).experts == {1: [], 2: [], 4: [2]}
    assert select_experts(scores, share=1.0).num_experts == 9
    even = Scores("token", {1: [0.5, 0.5], 2: [0.5, 0.5]})
    assert select_experts(even, share=0.75).experts == {1: [0, 1], 2: [0]}  # ... then the lower layer


def test_experts_are_selected_by_one_rule():
    scores = Scores("token", {1: [0.5, 0.5]})
    for both_or_none in ({"top_p": 0.5, "share": 0.5}, {}):
        with pytest.raises(ConfigError, match="either by top_p or by share"):
            select_experts(scores, **both_or_none)
    with pytest.raises(ConfigError, match="share=2 is not a share"):
        select_experts(scores, share=2)


@pytest.mark.parametrize("top_p", [0, -0.1, 1.01, float("nan")])
def test_a_top_p_that_is_no_share_is_an_error(top_p):
    with pytest.raises(ConfigError, match="is not a share"):
        select(0.5, 0.5, top_p=top_p)


def test_scores_that_cannot_reach_top_p_are_an_error_that_names_the_layer():
    with pytest.raises(ConfigError, match=r"layer 5 add up to 0\.40, so top_p=0\.5 would choose every expert"):
        select(0.25, 0.15, top_p=0.5)
    assert select(0.4999, 0.4999, top_p=0.9999) == [0, 1]


@pytest.mark.parametrize(
    ("profile", "options", "sentence"),
    [
        (make_profile(([1, 1], [1, 1]), ([0, 0], [0, 0])), {"score": "token"}, "Layer 1 of the expert profile saw no"),
        (make_profile(([1, 1], [0, 0])), {"score": "gate", "normalise": True}, "layer 0 add up to 0.0, so they cannot"),
        (make_profile(([1, 1], [1, 1])), {"score": "tokens"}, "score='tokens' is unknown; expected one of gate, token"),
        (make_profile(([1, 1], [1, 1])), {"score": "gate", "domain": "code"}, "has no domain 'code'; it has 'law'"),
    ],
)
def test_scores_that_would_mean_nothing_are_errors(profile, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        score_experts(profile, **options)


def test_a_saved_choice_is_esfts_file_and_loads_as_it_was(tmp_path):
    choice = ExpertChoice({10: [7, 1], 2: [3]}, shared_experts=True)
    choice.save(tmp_path / "expert_config.json")

    assert json.loads((tmp_path / "expert_config.json").read_text("utf-8")) == {
        "experts": {"2": [3], "10": [7, 1]},
        "shared_experts": True,
        "non_expert_modules": False,
    }
    assert ExpertChoice.load(tmp_path / "expert_config.json") == choice
    assert choice.num_experts == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not an expert_config.json: it is truncated or not JSON"),
        ("[1]", "is not an expert_config.json: expected a JSON object, found a list"),
        ("{}", "expected the fields experts, non_expert_modules, shared_experts"),
        ('{"experts": [], "shared_experts": false, "non_expert_modules": false}', "expected the fields experts"),
        ('{"experts": {}, "shared_experts": 0, "non_expert_modules": false}', "shared_experts is 0, not true or false"),
        ('{"experts": {"x": []}, "shared_experts": false, "non_expert_modules": false}', "layer 'x' is not the number"),
        ('{"experts": {"1": 3}, "shared_experts": false, "non_expert_modules": false}', "layer '1' is not the number"),
        (
            '{"experts": {"01": [1]}, "shared_experts": false, "non_expert_modules": false}',
            "layer '01' is not the numb",
        ),
        (
            '{"experts": {"\u0661": [1]}, "shared_experts": false, "non_expert_modules": false}',
            "is not the number of a",
        ),
        (
            '{"experts": {"1": [1], "1": [2]}, "shared_experts": false, "non_expert_modules": false}',
            "key '1' is there tw",
        ),
        ('{"experts": {}, "shared_experts": false, "shared_experts": true}', "the key 'shared_experts' is there twice"),
        (
            '{"experts": {"1": [-3]}, "shared_experts": false, "non_expert_modules": false}',
            "list of distinct expert id",
        ),
        ('{"experts": {"1": [2, 2]}, "shared_experts": false, "non_expert_modules": false}', "list of distinct expert"),
        ('{"experts": {"1": [true]}, "shared_experts": false, "non_expert_modules": false}', "list of distinct expert"),
    ],
)
def test_a_damaged_choice_is_refused_in_one_sentence(tmp_path, text, sentence):
    (tmp_path / "expert_config.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=sentence) as refused:
        ExpertChoice.load(tmp_path / "expert_config.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        (ExpertChoice({0: [1]}), "names layer 0; the model's layers with experts are 1, 2"),
        (ExpertChoice({1: [3, 8]}), "names expert 8 of layer 1, which has 8 experts"),
    ],
)
def test_a_choice_for_another_model_is_an_error(choice, sentence):
    layers = find_moe_layers(AutoModelForCausalLM.from_config(tiny_config("hub_moe")))
    with pytest.raises(ConfigError, match=sentence):
        choice.check(layers)


def test_a_choice_that_fits_the_model_passes_and_shared_experts_must_exist():
    ExpertChoice({1: [3], 2: []}, shared_experts=True).check(
        find_moe_layers(AutoModelForCausalLM.from_config(tiny_config("hub_moe")))
    )
    with pytest.raises(ConfigError, match="trains the shared experts, but the model has none"):
        ExpertChoice({1: [3]}, shared_experts=True).check(
            find_moe_layers(AutoModelForCausalLM.from_config(tiny_config("olmoe")))
        )
