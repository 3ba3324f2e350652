import copy

import pytest
import torch

from hub_moe.anatomy import record_routing
from hub_moe.data import LoadedRows, set_chat_template
from hub_moe.errors import DatasetError
from hub_moe.training.profiling import draw_sample, profile_experts

WORDS = ["A", "router", "scores", "every", "token", "against", "every", "expert"]
ROWS = [{"prompt": f"{WORDS[n % 8]} {n}", "completion": " ".join(WORDS[: 1 + n % 7])} for n in range(20)]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    set_chat_template(tokenizer, "plain")
    return tokenizer


def draw(tokenizer, rows=ROWS, **changes):
    options = {"num_rows": 7, "max_length": 100, "batch_size": 3, "seed": 0, **changes}
    return draw_sample(LoadedRows.from_list(rows), tokenizer, **options)


def contents(sample):
    return [row["input_ids"].tolist() for row in sample.rows]


def test_a_sample_depends_on_seed_and_content_and_not_on_order(tokenizer):
    sample = draw(tokenizer)

    assert contents(draw(tokenizer, ROWS[::-1])) == contents(sample)
    assert contents(draw(tokenizer, seed=1)) != contents(sample)
    assert contents(draw(tokenizer, num_rows=3)) == contents(sample)[:3]
    assert len(draw(tokenizer, num_rows=99).rows) == 20


def test_a_sample_says_where_it_is_from_and_comes_in_batches(tokenizer):
    sample = draw(tokenizer)

    assert {"source": "rows in memory", "rows": 7, "max_length": 100, "seed": 0}.items() <= sample.dataset.items()
    assert [len(batch["input_ids"]) for batch in sample.batches()] == [3, 3, 1]
    assert sample.num_batches == 3


def test_rows_that_do_not_fit_stop_it_unless_allowed(tokenizer):
    rows = [*ROWS, {"prompt": "no answer", "completion": ""}]
    with pytest.raises(DatasetError, match="1 of 21 rows do not fit"):
        draw(tokenizer, rows)
    assert len(draw(tokenizer, rows, num_rows=99, allow_bad_rows=0.1).rows) == 20


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_profile_counts_every_token_of_every_row_whatever_the_batches(tiny_model, tokenizer, batch_size):
    sample = draw(tokenizer, batch_size=batch_size)
    with record_routing(tiny_model) as routing, torch.no_grad():
        for row in sample.rows:
            tiny_model(row["input_ids"][None])
    heard = []
    profile = profile_experts(
        tiny_model.train(), sample, name="alice/moe", domain="words", on_batch=lambda *both: heard.append(both)
    )
    domain = profile.domain("words")

    assert domain.num_tokens == sum(len(ids) for ids in contents(sample))
    assert (profile.model, profile.revision, domain.num_sequences) == ("alice/moe", None, 7)
    assert domain.dataset == sample.dataset
    for routed, layer in zip(routing.layers, domain.layers.values(), strict=True):
        assert layer.tokens == tuple(routed.tokens_E.tolist())
        assert layer.gate_mass == pytest.approx(routed.gate_mass_E.tolist(), rel=1e-5)
        assert layer.output_norm is None
    assert heard == [(done, sample.num_batches) for done in range(sample.num_batches + 1)]


def test_the_training_mode_of_each_module_is_as_before_and_norms_are_there_when_asked(tiny_model, tokenizer):
    tiny_model.train().model.layers[0].eval()
    modes = [module.training for module in tiny_model.modules()]
    profile = profile_experts(tiny_model, draw(tokenizer), name="m", domain="d", output_norms=True)

    assert [module.training for module in tiny_model.modules()] == modes
    assert all(min(layer.saliency) >= 0 < max(layer.saliency) for layer in profile.domain().layers.values())
