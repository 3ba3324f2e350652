"""Shape letters: B sequences, L tokens, E routed experts, K experts per token."""

import logging

import pytest
import torch

from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.modeling.losses import balance_losses, router_z_loss, shift_labels_ahead


def _losses_by_hand(logits_BLE, expert_BLK, mask_BL, scoring_func, num_groups):
    """The formulas of arXiv:2405.04434 eq. 23 to 28, one number at a time, averaged over sequences."""
    num_experts, top_k = logits_BLE.shape[-1], expert_BLK.shape[-1]
    expert_losses, device_losses = [], []
    for logits_LE, expert_LK, mask_L in zip(logits_BLE, expert_BLK, mask_BL, strict=True):
        kept = [t for t in range(len(mask_L)) if mask_L[t]]
        if not kept:
            continue
        f, p = [0.0] * num_experts, [0.0] * num_experts
        for t in kept:
            scores = torch.softmax(logits_LE[t], 0) if scoring_func == "softmax" else torch.sigmoid(logits_LE[t])
            for e in range(num_experts):
                f[e] += (e in expert_LK[t].tolist()) * num_experts / (top_k * len(kept))
                p[e] += (scores[e] / scores.sum()).item() / len(kept)
        expert_losses.append(sum(a * b for a, b in zip(f, p, strict=True)))
        size = num_experts // num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        device_losses.append(sum(sum(f[e] for e in g) / size * sum(p[e] for e in g) for g in groups))
    return sum(expert_losses) / len(expert_losses), sum(device_losses) / len(device_losses)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_balance_losses_equal_the_papers_formulas(scoring_func):
    logits_BLE = torch.randn(3, 7, 8)
    expert_BLK = torch.stack([torch.randperm(8)[:2] for _ in range(21)]).view(3, 7, 2)
    mask_BL = torch.ones(3, 7).long()
    mask_BL[1, :4] = 0
    mask_BL[2] = 0
    actual = balance_losses(logits_BLE, expert_BLK, mask_BL, scoring_func=scoring_func, num_groups=4, per_sequence=True)
    expected = _losses_by_hand(logits_BLE, expert_BLK, mask_BL, scoring_func, num_groups=4)
    assert [loss.item() for loss in actual] == pytest.approx(expected, rel=1e-5)


def test_batchwise_balance_treats_the_batch_as_one_sequence():
    logits_BLE = torch.randn(2, 5, 8)
    expert_BLK = torch.randint(0, 8, (2, 5, 1))
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    options = {"scoring_func": "softmax", "num_groups": 2}
    batch = balance_losses(logits_BLE, expert_BLK, mask_BL, per_sequence=False, **options)
    kept = mask_BL.bool()
    one = balance_losses(logits_BLE[kept][None], expert_BLK[kept][None], torch.ones(1, 7), per_sequence=True, **options)
    torch.testing.assert_close(batch, one)


def test_perfect_balance_costs_one_and_collapse_costs_more():
    options = {"scoring_func": "softmax", "num_groups": 2, "per_sequence": True}
    even = torch.arange(8).view(1, 8, 1)
    balanced = balance_losses(torch.zeros(1, 8, 8), even, torch.ones(1, 8), **options)
    assert [loss.item() for loss in balanced] == pytest.approx([1.0, 1.0])
    logits = torch.zeros(1, 8, 8)
    logits[..., 0] = 9.0
    collapsed = balance_losses(logits, torch.zeros_like(even), torch.ones(1, 8), **options)
    assert collapsed[0] > 7.9
    assert collapsed[1] > 1.9


def test_z_loss_is_the_mean_squared_logsumexp_without_padding():
    logits_BLE = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [100.0, 0.0]]])
    log2 = torch.tensor(2.0).log().item()
    expected = (log2**2 + (3 + log2) ** 2) / 2
    assert router_z_loss(logits_BLE, torch.tensor([[1, 1, 0]])).item() == pytest.approx(expected)


def test_labels_ahead_stop_at_the_end_of_a_packed_document():
    labels = torch.tensor([[10, 11, 12, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert shift_labels_ahead(labels, None, None, steps=2).tolist() == [[12, 20, 21, 22, -100]]
    assert shift_labels_ahead(labels, None, positions, steps=2).tolist() == [[12, -100, -100, 22, -100]]
    left_padded = torch.tensor([[0, 1, 1, 1, 1, 1]])
    assert shift_labels_ahead(labels, left_padded, None, steps=2).tolist() == [[-100, 20, 21, 22, -100]]


def _training_model(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return HubMoeForCausalLM(config).train()


@pytest.mark.parametrize(
    ("weight", "output"),
    [("aux_loss_alpha", "aux_loss"), ("device_aux_loss_alpha", "device_aux_loss"), ("router_z_loss_coef", "z_loss")],
)
def test_each_router_loss_joins_the_loss_in_training_only(tiny_config, weight, output):
    tokens = torch.randint(2, 128, (2, 9))
    plain = _training_model(tiny_config)(tokens, labels=tokens)
    model = _training_model(tiny_config, **{weight: 0.5})
    trained = model(tokens, labels=tokens)
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * getattr(trained, output))
    assert torch.equal(model.eval()(tokens, labels=tokens).loss, plain.loss)


def test_router_losses_pull_the_router(tiny_config):
    tokens = torch.randint(2, 128, (2, 9))
    plain = _training_model(tiny_config)
    plain(tokens, labels=tokens).loss.backward()
    model = _training_model(tiny_config, aux_loss_alpha=1.0)
    model(tokens, labels=tokens).loss.backward()
    for layer, reference in zip(model.model.layers[1:], plain.model.layers[1:], strict=True):
        assert not torch.equal(layer.mlp.gate.weight.grad, reference.mlp.gate.weight.grad)


def test_gradient_accumulation_adds_up_to_the_whole_batch(tiny_config):
    """The router losses are means, so each micro-batch counts by its part of the labels."""
    tokens = torch.randint(2, 128, (4, 9))
    whole = _training_model(tiny_config, aux_loss_alpha=1.0)
    whole(tokens, labels=tokens).loss.backward()
    parts = _training_model(tiny_config, aux_loss_alpha=1.0)
    for micro_batch in tokens.split(2):
        parts(micro_batch, labels=micro_batch, num_items_in_batch=4 * 8).loss.backward()
    for (name, parameter), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    tokens = torch.randint(2, 128, (2, 9))
    plain = _training_model(tiny_config, aux_loss_alpha=0.5, num_mtp_layers=1)
    plain(tokens, labels=tokens).loss.backward()
    model = _training_model(tiny_config)
    model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_reentrant_checkpointing_with_a_router_loss_warns_aloud(tiny_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokens = torch.randint(2, 128, (2, 9))
    model = _training_model(tiny_config, aux_loss_alpha=0.5)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(tokens, labels=tokens)
    assert "aux_loss_alpha=0.5 cannot reach the router" in caplog.text
    assert "WITHOUT this loss" in caplog.text


def test_frozen_router_below_the_first_trained_layer_warns_of_nothing(tiny_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = _training_model(tiny_config, aux_loss_alpha=0.5)
    model.requires_grad_(False)
    model.model.layers[2].mlp.experts.down_proj.requires_grad_(True)
    tokens = torch.randint(2, 128, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    assert model.model.layers[2].mlp.experts.down_proj.grad is not None
    assert not caplog.text


def test_routing_outputs_come_on_request_and_leave_padding_out(tiny_model):
    tokens = torch.randint(2, 128, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    silent = tiny_model(tokens, attention_mask=mask)
    assert silent.router_logits is None
    assert silent.expert_load is None
    outputs = tiny_model(tokens, attention_mask=mask, output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(12, 8), (12, 8)]
    assert outputs.expert_load.shape == (2, 8)
    assert outputs.expert_load.sum(dim=1).tolist() == [9 * 2, 9 * 2]
    assert torch.equal(silent.logits, outputs.logits)
