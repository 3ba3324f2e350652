import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import (
    compare_fingerprints,
    expert_tensors,
    find_moe_layers,
    fingerprint,
    hash_tensor,
    named_tensors,
)
from hub_moe.anatomy.changes import COLUMNS
from hub_moe.errors import CheckpointError, TrainingProofError

from .families import FAMILIES, tiny_config

BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
UP = "model.layers.2.mlp.experts.5.up_proj.weight"
NORM = "model.norm.weight"


def build(model_type="hub_moe", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))


def change(model, *names):
    views = {name: view for name, *_, view in named_tensors(model, find_moe_layers(model))}
    for name in names:
        views[name].view(-1)[0] += 1
    return fingerprint(model)


@pytest.fixture(scope="module")
def before():
    return fingerprint(build())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_fingerprint_holds_the_hash_of_every_tensor(model_type):
    model = build(model_type)
    rows = list(named_tensors(model, find_moe_layers(model)))
    tensors = fingerprint(model).tensors

    assert list(tensors) == [name for name, *_ in rows]
    for name, kind, layer, view in rows:
        found = tensors[name]
        assert (found.kind, found.layer, found.size, found.dtype) == (kind, layer, view.numel(), "float32")
        assert found.sha256 == hash_tensor(view)


def test_nothing_changed_is_a_table_of_frozen_tensors(before):
    table = compare_fingerprints(before, fingerprint(build()), trained=[])
    table.check()

    assert table.violations == ()
    totals = table.totals()
    assert totals["changed_tensors"] == totals["trained_tensors"] == 0
    assert totals["frozen_numbers"] == totals["numbers"] == sum(each.numel() for each in build().state_dict().values())
    assert all(row.sha256_before == row.sha256_after for row in table.rows)


def test_rows_come_by_kind_and_layer_and_cover_the_model_once(before):
    rows = compare_fingerprints(before, before, trained=[]).rows
    groups = [(row.kind, row.layer) for row in rows]

    assert groups == [
        ("routed_experts", 1),
        ("routed_experts", 2),
        ("shared_experts", 1),
        ("shared_experts", 2),
        ("router", 1),
        ("router", 2),
        ("attention", 0),
        ("attention", 1),
        ("attention", 2),
        ("dense_mlp", 0),
        ("norms", None),
        ("norms", 0),
        ("norms", 1),
        ("norms", 2),
        ("embeddings", None),
        ("head", None),
    ]
    assert rows[0].tensors == 8 * 3
    assert rows[0].numbers == 8 * 3 * 16 * 32


def test_a_trained_tensor_that_changed_shows_in_its_row_alone(before):
    after = change(build(), UP, BIAS)
    table = compare_fingerprints(before, after, trained=[UP, BIAS])
    table.check()

    assert table.violations == ()
    changed = {(row.kind, row.layer): row for row in table.rows if row.sha256_before != row.sha256_after}
    assert changed.keys() == {("routed_experts", 2), ("router", 2)}
    experts = changed["routed_experts", 2]
    assert (experts.trained_tensors, experts.changed_tensors, experts.trained_numbers) == (1, 1, 16 * 32)


def test_a_change_of_what_was_to_stay_frozen_is_an_error_that_names_it(before):
    table = compare_fingerprints(before, change(build(), UP, BIAS, NORM), trained=[UP])

    assert [(each.name, each.problem) for each in table.violations] == [
        (BIAS, "changed, not trained"),
        (NORM, "changed, not trained"),
    ]
    with pytest.raises(TrainingProofError, match=f"2 tensors changed that were to stay frozen: {BIAS}, {NORM}"):
        table.check()


def test_a_trained_tensor_that_did_not_change_is_listed_and_no_error(before):
    table = compare_fingerprints(before, change(build(), UP), trained=[UP, NORM])
    table.check()

    assert [(each.name, each.kind, each.layer, each.problem) for each in table.violations] == [
        (NORM, "norms", None, "trained, not changed")
    ]


def test_one_bit_of_one_expert_is_found(before):
    model = build()
    down = expert_tensors(find_moe_layers(model)[0], 7)["model.layers.1.mlp.experts.7.down_proj.weight"]
    down.view(torch.int32).view(-1)[-1] ^= 1
    with pytest.raises(TrainingProofError, match=r"1 tensors changed .* model.layers.1.mlp.experts.7.down_proj.weight"):
        compare_fingerprints(before, fingerprint(model), trained=[UP]).check()


def test_many_wrong_tensors_are_counted_and_some_named(before):
    table = compare_fingerprints(before, fingerprint(build().to(torch.bfloat16)), trained=[])
    with pytest.raises(TrainingProofError, match=r"tensors changed .* and \d+ more\.$"):
        table.check()


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda: fingerprint(build(num_hidden_layers=2)), r"the later one lacks model.layers.2.* and \d+ more"),
        (lambda: fingerprint(build(num_mtp_layers=1)), "the later one has besides model.layers.3"),
        (lambda: fingerprint(build(vocab_size=64)), "other sizes of model.embed_tokens.weight, lm_head.weight"),
    ],
)
def test_fingerprints_of_different_models_cannot_be_compared(before, after, message):
    with pytest.raises(TrainingProofError, match=message):
        compare_fingerprints(before, after(), trained=[])


def test_a_trained_name_that_is_not_in_the_model_is_an_error(before):
    with pytest.raises(TrainingProofError, match=r"not in the model: model.layers.2.mlp.experts.up_proj"):
        compare_fingerprints(before, before, trained=["model.layers.2.mlp.experts.up_proj"])


def test_a_tied_weight_is_counted_once():
    model = build(tie_word_embeddings=True)
    table = compare_fingerprints(fingerprint(model), fingerprint(model), trained=[])

    assert table.totals()["numbers"] == sum(
        each.numel() for name, each in model.state_dict().items() if name != "lm_head.weight"
    )


def test_a_table_reads_well_and_is_plain_json(before):
    table = compare_fingerprints(before, change(build(), UP), trained=[UP, NORM])
    cells = table.cells()
    data = json.loads(json.dumps(table.to_dict()))

    assert all(len(row) == len(COLUMNS) for row in cells)
    assert cells[1][:6] == ("routed_experts", "2", "24", "12,288", "1", "1")
    assert cells[-1][:6] == ("head", "", "1", "4,096", "-", "-")
    assert data["totals"]["changed_numbers"] == 512
    assert data["violations"] == [{"name": NORM, "kind": "norms", "layer": None, "problem": "trained, not changed"}]


def test_progress_ends_with_all_bytes():
    model, seen = build(), []
    fingerprint(model, on_progress=lambda done, total: seen.append((done, total)))

    size = sum(each.nbytes for each in model.state_dict().values())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


def test_a_model_without_weights_has_no_fingerprint():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("hub_moe"))
    with pytest.raises(CheckpointError, match="load the model's weights first"):
        fingerprint(model)
