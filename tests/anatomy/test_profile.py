import dataclasses
import json
import math
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import DomainProfile, ExpertProfile, LayerProfile, record_routing
from hub_moe.errors import ConfigError

from .families import tiny_config

SOURCE = {"name": "alice/laws", "revision": "0" * 40}


def make_profile(seed=0, domains=("law",), *, experts=8, norms=True, dataset=SOURCE, **changes):
    """A profile of two layers with random sums."""
    draw = random.Random(seed)

    def layer():
        sums = [tuple(draw.uniform(0, 9) for _ in range(experts)) for _ in range(3 if norms else 1)]
        return LayerProfile(tuple(draw.randrange(50) for _ in range(experts)), *sums)

    parts = {name: DomainProfile(dataset, 100, 4, {1: layer(), 2: layer()}) for name in domains}
    return dataclasses.replace(ExpertProfile("alice/moe", "a" * 40, 2, parts, 900, 10), **changes)


def test_the_profile_of_a_run_holds_what_was_recorded():
    model = AutoModelForCausalLM.from_config(tiny_config("hub_moe", num_mtp_layers=1)).eval()
    tokens_BL = torch.randint(2, 128, (2, 10))
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    with record_routing(model, output_norms=True) as routing, torch.no_grad():
        model(tokens_BL, attention_mask=mask_BL)
    profile = ExpertProfile.from_routing(routing, model="m", domain="noise", dataset=SOURCE, num_sequences=2)
    domain = profile.domain()

    assert profile.num_parameters == model.num_parameters()
    assert profile.num_per_expert == 3 * 16 * 32
    assert (profile.top_k, domain.num_tokens, domain.num_sequences, list(domain.layers)) == (2, 16, 2, [1, 2])
    for routed, layer in zip(routing.layers, domain.layers.values(), strict=False):
        assert layer.tokens == tuple(routed.tokens_E.tolist())
        assert layer.gate_mass == tuple(routed.gate_mass_E.tolist())
        assert layer.output_norm == tuple(routed.output_norm_E.tolist())
        assert layer.gated_output_norm == tuple(routed.gated_output_norm_E.tolist())


def test_weights_that_are_not_a_number_are_an_error_that_names_the_layer():
    model = AutoModelForCausalLM.from_config(tiny_config("mixtral")).eval()
    with torch.no_grad(), record_routing(model) as routing:
        model.model.layers[1].mlp.gate.weight.fill_(torch.nan)
        model(torch.arange(5)[None])
    with pytest.raises(ConfigError, match=r"routing of model\.layers\.1\.mlp holds numbers that are not finite"):
        ExpertProfile.from_routing(routing, model="m", domain="d", dataset={}, num_sequences=1)


def test_shares_imbalance_dead_experts_and_saliency():
    layer = LayerProfile((6, 2, 0, 0), (3.0, 1.0, 0.0, 0.0), (12.0, 8.0, 0.0, 0.0), (6.0, 4.0, 0.0, 0.0))

    assert layer.token_shares == layer.gate_shares == (0.75, 0.25, 0.0, 0.0)
    assert (layer.imbalance, layer.num_dead) == (3.0, 2)
    assert layer.saliency == (1.0, 2.0, 0.0, 0.0)


def test_a_layer_without_tokens_is_even_and_one_without_norms_has_no_saliency():
    layer = LayerProfile((0, 0), (0.0, 0.0))

    assert (layer.token_shares, layer.gate_shares, layer.imbalance) == ((0.0, 0.0), (0.0, 0.0), 1.0)
    assert layer.saliency is None


@pytest.mark.parametrize("norms", [True, False])
def test_a_saved_profile_loads_as_it_was_and_is_readable(tmp_path, norms):
    profile = make_profile(domains=("law", "意図"), norms=norms)
    profile.save(tmp_path / "profile.json")
    text = (tmp_path / "profile.json").read_text("utf-8")

    assert ExpertProfile.load(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert "意図" in text
    assert len(text.splitlines()) < 60
    assert f'"tokens": {list(profile.domains["law"].layers[1].tokens)}' in text


def test_text_that_looks_like_a_list_of_numbers_is_saved_as_it_is(tmp_path):
    profile = make_profile(dataset={"name": "[\n 1,\n 2]", "splits": ["[ a ]"], "empty": [], "shards": [1, 2]})
    profile.save(tmp_path / "p.json")

    assert ExpertProfile.load(tmp_path / "p.json") == profile


def test_a_failed_save_leaves_the_old_profile_and_no_scraps(tmp_path):
    make_profile().save(tmp_path / "p.json")
    broken = make_profile(domains=())
    broken = dataclasses.replace(broken, domains={"law": DomainProfile({}, 1, 1, {0: LayerProfile((1,), (math.nan,))})})
    with pytest.raises(ConfigError, match="a number that is not finite"):
        broken.save(tmp_path / "p.json")
    with pytest.raises(OSError, match="nowhere"):
        make_profile().save(tmp_path / "nowhere" / "p.json")

    assert ExpertProfile.load(tmp_path / "p.json") == make_profile()
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_truncated_profile_is_refused_in_one_sentence(tmp_path):
    make_profile(experts=2, norms=False).save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text("utf-8").rstrip()
    for length in range(0, len(text), 7):
        (tmp_path / "cut.json").write_text(text[:length], "utf-8")
        with pytest.raises(ConfigError, match=r"cut.json is not an expert profile: it is truncated or not JSON") as cut:
            ExpertProfile.load(tmp_path / "cut.json")
        assert "\n" not in str(cut.value)


def _change(*path, to):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def _drop(*path):
    def drop(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return drop


_LAYER = ("domains", "law", "layers", "1")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_change("format", to="other"), "is not an expert profile: its format is 'other'"),
        (_drop("format"), "is not an expert profile: its format is None"),
        (_change("version", to=2), r"of version 2; this hub_moe reads 1\."),
        (_drop("model"), "is not a whole expert profile: it lacks 'model'"),
        (_change("model", to=3), "'model' is a int, not a str"),
        (_change("top_k", to=-1), "'top_k' is no count"),
        (_change("top_k", to=True), "'top_k' is no count"),
        (_change("num_parameters", to=-1), "'num_parameters' is no count"),
        (_drop("num_per_expert"), "it lacks 'num_per_expert'"),
        (_change("revision", to=[]), "'revision' is a list"),
        (_change("domains", to={}), "it has no domain"),
        (_change("domains", "law", to=[]), "domain 'law' is no object"),
        (_drop("domains", "law", "num_tokens"), "it lacks 'num_tokens'"),
        (_change("domains", "law", "layers", to={}), "domain 'law' has no layer"),
        (_change("domains", "law", "layers", "x", to={}), "it lacks 'tokens'|invalid literal"),
        (_change(*_LAYER, to=None), "layer 1 is no object"),
        (_change(*_LAYER, "tokens", to=[1.5] * 8), "tokens of layer 1 are not counts"),
        (_change(*_LAYER, "tokens", to=[-1] * 8), "tokens of layer 1 are not counts"),
        (_change(*_LAYER, "tokens", to=[]), "tokens of layer 1 are not counts"),
        (_change(*_LAYER, "gate_mass", to=[1.0]), "gate_mass of layer 1 is not 8 finite numbers"),
        (_change(*_LAYER, "output_norm", to=[math.inf] * 8), "output_norm of layer 1 is not 8 finite numbers"),
        (_change(*_LAYER, "gate_mass", to=["1"] * 8), "gate_mass of layer 1 is not 8 finite numbers"),
        (_drop("domains", "code", "layers", "2"), "its domains differ in layers or experts"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_sentence(tmp_path, damage, sentence):
    make_profile(domains=("law", "code")).save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text("utf-8"))
    damage(data)
    (tmp_path / "p.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ConfigError, match=sentence) as refused:
        ExpertProfile.load(tmp_path / "p.json")

    assert str(refused.value).startswith(str(tmp_path / "p.json"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "3", '"law"', "[" * 100_000, "\x00\xff"])
def test_a_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"p.json is not an expert profile: "):
        ExpertProfile.load(tmp_path / "p.json")


def test_shards_add_up_exactly_in_any_order():
    shards = [make_profile(seed) for seed in range(7)]
    merged = ExpertProfile.merge(shards)
    layers = [shard.domain().layers[2] for shard in shards]

    assert ExpertProfile.merge(reversed(shards)) == merged
    assert (merged.domain().num_tokens, merged.domain().num_sequences) == (700, 28)
    assert merged.domain().layers[2].tokens[3] == sum(layer.tokens[3] for layer in layers)
    assert merged.domain().layers[2].gate_mass[3] == math.fsum(layer.gate_mass[3] for layer in layers)
    assert merged.domain().layers[2].gated_output_norm[0] == math.fsum(layer.gated_output_norm[0] for layer in layers)


def test_domains_stand_side_by_side():
    law, code = make_profile(0, ("law",)), make_profile(1, ("code",), norms=False, dataset={"name": "code"})
    both = ExpertProfile.merge([law, code])

    assert dict(both.domains) == {**law.domains, **code.domains}
    assert both.domain("code") == code.domain()
    with pytest.raises(ConfigError, match="needs a domain; it has 'law', 'code'"):
        both.domain()
    with pytest.raises(ConfigError, match="has no domain 'prose'; it has 'law', 'code'"):
        both.domain("prose")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (make_profile(model="bob/moe"), "different models do not merge: alice/moe at a+, bob/moe at a+"),
        (make_profile(revision=None), "different models do not merge: alice/moe at a+, alice/moe at None"),
        (make_profile(top_k=4), "differ in layers, experts or experts per token"),
        (make_profile(experts=16), "differ in layers, experts or experts per token"),
        (make_profile(dataset={"name": "bob/laws"}), "domain 'law' stands for two datasets"),
        (make_profile(norms=False), "Only some shards of the domain 'law' have output norms"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(other, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ExpertProfile.merge([make_profile(), other])


def test_merging_nothing_is_an_error():
    with pytest.raises(ConfigError, match="at least one expert profile"):
        ExpertProfile.merge([])


def test_one_process_reduces_to_itself():
    profile = make_profile()
    assert profile.reduce() is profile


_TWO_RANKS = """
import dataclasses
import sys
import torch
from hub_moe.anatomy import ExpertProfile

rank = int(sys.argv[1])
profile = ExpertProfile.load(sys.argv[4])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
profile.reduce().save(sys.argv[3])
try:
    dataclasses.replace(profile, model=f"model {rank}").reduce()
except ValueError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_two_processes_reduce_to_the_merged_profile(tmp_path):
    inputs, outputs = ([tmp_path / f"{name} {rank}.json" for rank in range(2)] for name in ("in", "out"))
    for rank in range(2):
        make_profile(rank).save(inputs[rank])
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _TWO_RANKS,
                str(rank),
                str(tmp_path / "meeting"),
                str(outputs[rank]),
                str(inputs[rank]),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]

    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all("different models do not merge: model 0 at" in text for text in said)
    merged = ExpertProfile.merge([make_profile(0), make_profile(1)])
    assert [ExpertProfile.load(path) for path in outputs] == [merged, merged]
