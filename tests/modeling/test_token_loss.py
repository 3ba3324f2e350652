"""The loss of a model by compiled code and by transformers, with the gradients of all its weights."""

import copy

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from hub_moe.experts.compiled_products import find_levels
from hub_moe.modeling import HubMoeForCausalLM, losses

needs_compiled = pytest.mark.skipif(not find_levels(), reason="no compiled products for this processor")


@pytest.fixture
def compiled_calls(monkeypatch):
    """What the compiled losses were, as often as they were asked for."""
    found, token_losses = [], losses.token_losses

    def count(*given, **options):
        found.append(token_losses(*given, **options))
        return found[-1]

    monkeypatch.setattr(losses, "token_losses", count)
    return found


def make_labels(tokens):
    labels = tokens.clone()
    labels[0, :3] = -100
    return labels


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
def test_loss_and_gradients_are_those_of_transformers(tiny_config, dtype, num_items, compiled_calls, monkeypatch):
    config = copy.deepcopy(tiny_config)
    config.num_mtp_layers = 1
    model = HubMoeForCausalLM(config).to(dtype).train()
    tokens = torch.randint(2, config.vocab_size, (2, 17))
    given = {"labels": make_labels(tokens), "use_cache": False}
    if num_items is not None:
        given["num_items_in_batch"] = num_items

    def step():
        model.zero_grad()
        output = model(tokens, **given)
        output.loss.backward()
        return [output.loss.detach(), output.mtp_loss.detach()], [
            p.grad for p in model.parameters() if p.grad is not None
        ]

    actual = step()
    assert len(compiled_calls) == 2  # the next token's and the MTP layer's
    assert all(each is not None for each in compiled_calls)
    monkeypatch.setattr(losses, "token_losses", None)
    expected = step()
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    largest = 1e-5 if dtype is torch.float32 else 1e-2
    for one, other in zip(actual[1], expected[1], strict=True):
        assert (one - other).norm() <= largest * other.norm()


@needs_compiled
def test_another_ignored_label_is_ignored(compiled_calls):
    logits_BLV, labels_BL = torch.randn(2, 9, 20), torch.randint(0, 20, (2, 9))
    given = {"labels": labels_BL, "vocab_size": 20, "ignore_index": int(labels_BL[0, 3])}
    actual = losses.token_loss(ForCausalLMLoss, logits_BLV, **given)
    assert len(compiled_calls) == 1
    torch.testing.assert_close(actual, ForCausalLMLoss(logits_BLV, **given))


def test_a_loss_function_of_the_users_own_is_called(tiny_model, compiled_calls):
    tokens = torch.randint(2, tiny_model.config.vocab_size, (1, 8))
    tiny_model.loss_function = lambda logits, labels, **_: 7 * logits.sum() * 0 + labels.sum()
    assert tiny_model(tokens, labels=tokens).loss == tokens.sum()
    assert not compiled_calls


@needs_compiled
def test_without_any_label_the_loss_is_nan_as_in_transformers():
    given = {"labels": torch.full((1, 5), -100), "vocab_size": 20}
    assert losses.token_loss(ForCausalLMLoss, torch.randn(1, 5, 20), **given).isnan()
    assert ForCausalLMLoss(torch.randn(1, 5, 20), **given).isnan()


def test_a_label_outside_the_vocabulary_is_an_error(tiny_model):
    tokens = torch.randint(2, tiny_model.config.vocab_size, (1, 8))
    labels = tokens.clone()
    labels[0, 5] = tiny_model.config.vocab_size
    with pytest.raises(IndexError, match="out of bounds"):
        tiny_model(tokens, labels=labels)
