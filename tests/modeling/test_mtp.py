"""Multi-token prediction: trains, survives saving, drafts in generation. Names as in arXiv:2412.19437 section 2.2."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hub_moe.errors import ConfigError, GenerationError
from hub_moe.modeling import HubMoeForCausalLM, HubMoeModel
from tests.modeling.stock_models import save_stock


@pytest.fixture
def mtp_model(tiny_config):
    tiny_config.num_mtp_layers = 2
    torch.manual_seed(0)
    return HubMoeForCausalLM(tiny_config)


def _mtp_loss_by_hand(model, tokens):
    """One depth after the other, on whole sequences, cutting off what has no next token."""
    hidden = model.model(tokens).last_hidden_state
    embeds = model.model.embed_tokens(tokens)
    losses = []
    for depth, layer in enumerate(model.model.mtp_layers, start=1):
        joined = torch.cat([layer.enorm(embeds[:, depth:]), layer.hnorm(hidden[:, :-1])], dim=-1)
        length = joined.shape[1]
        positions = torch.arange(depth, depth + length)[None]
        causal = torch.ones(length, length).tril().log()[None, None]
        state = layer.eh_proj(joined)
        attended, _ = layer.self_attn(
            layer.input_layernorm(state), model.model.rotary_emb(state, positions), attention_mask=causal
        )
        state = state + attended
        state = state + layer.mlp(layer.post_attention_layernorm(state))
        hidden = layer.shared_head["norm"](state)
        logits = model.lm_head(hidden)[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, depth + 1 :].flatten()))
    return torch.stack(losses).mean()


def test_mtp_loss_equals_the_papers_chain_written_out(mtp_model):
    mtp_model.train().config._attn_implementation = "eager"
    tokens = torch.randint(2, 128, (2, 11))
    outputs = mtp_model(tokens, labels=tokens)
    torch.testing.assert_close(outputs.mtp_loss, _mtp_loss_by_hand(mtp_model, tokens))
    next_token = mtp_model.eval()(tokens, labels=tokens).loss
    torch.testing.assert_close(outputs.loss, next_token + 0.3 * outputs.mtp_loss)


def test_mtp_layers_get_gradients_and_their_routers_count(mtp_model):
    mtp_model.train()
    mtp_model.config.aux_loss_alpha = 0.1
    tokens = torch.randint(2, 128, (2, 11))
    outputs = mtp_model(tokens, labels=tokens)
    outputs.loss.backward()
    assert all(p.grad.abs().sum() > 0 for layer in mtp_model.model.mtp_layers for p in layer.parameters())
    assert outputs.expert_load.sum(dim=1).tolist() == [2 * 2 * length for length in (11, 11, 10, 9)]


def test_left_padding_does_not_change_the_mtp_loss(mtp_model):
    mtp_model.train()
    tokens = torch.randint(2, 128, (1, 9))
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), tokens], dim=1)
    mask = (padded != 1).long()
    plain = mtp_model(tokens, labels=tokens)
    other = mtp_model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
    torch.testing.assert_close(other.mtp_loss, plain.mtp_loss, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_predict_into_each_other(mtp_model):
    mtp_model.train()
    first, second = torch.randint(2, 128, (1, 7)), torch.randint(2, 128, (1, 5))
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    together = mtp_model(packed, labels=packed, position_ids=positions, use_cache=False).mtp_loss
    # each depth averages over its own targets: 5 + 3 at the first, 4 + 2 at the second
    per_depth = []
    for depth, counts in ((0, (5, 3)), (1, (4, 2))):
        mtp_model.config.num_mtp_layers = 2
        parts = [_depth_loss(mtp_model, document, depth) for document in (first, second)]
        per_depth.append(sum(c * p for c, p in zip(counts, parts, strict=True)) / sum(counts))
    torch.testing.assert_close(together, sum(per_depth) / 2, rtol=1e-4, atol=1e-5)


def test_nothing_leaks_from_padding_or_from_the_document_before(mtp_model):
    """Only what must not matter changes, with weights large enough for it to show if it did."""
    mtp_model.train()
    with torch.no_grad():
        for parameter in mtp_model.parameters():
            parameter.mul_(4)
    tokens = torch.randint(10, 128, (1, 7))
    losses = []
    for pad in (1, 5, 9):
        padded = torch.cat([torch.full((1, 3), pad), tokens], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * 7])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = mtp_model(
            padded,
            attention_mask=mask,
            position_ids=positions,
            labels=padded.masked_fill(mask == 0, -100),
            output_router_logits=True,
        )
        losses.append((outputs.mtp_loss, outputs.aux_loss))
        assert outputs.expert_load.sum(dim=1).tolist() == [2 * length for length in (7, 7, 6, 5)]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    losses = []
    for _ in range(2):
        packed = torch.cat([torch.randint(10, 128, (1, 4)), tokens], dim=1)
        positions = torch.tensor([[0, 1, 2, 3, *range(7)]])
        labels = torch.cat([torch.full((1, 4), -100), tokens], dim=1)
        losses.append(mtp_model(packed, position_ids=positions, labels=labels, use_cache=False).mtp_loss)
    torch.testing.assert_close(losses[0], losses[1])


def _depth_loss(model, tokens, depth):
    hidden = model.model(tokens).last_hidden_state
    ahead = model.model.predict_ahead(model.model.embed_tokens(tokens), hidden, None, None)
    logits = model.lm_head(ahead.depth_hidden_states[depth])[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, depth + 2 :].flatten())


def test_sequence_too_short_to_look_ahead_has_no_mtp_loss(mtp_model):
    tokens = torch.randint(2, 128, (2, 1))
    outputs = mtp_model.train()(tokens, labels=torch.zeros_like(tokens), num_items_in_batch=1)
    assert outputs.mtp_loss.item() == 0.0


def test_four_dimensional_mask_is_refused_in_training(mtp_model):
    tokens = torch.randint(2, 128, (1, 4))
    with pytest.raises(ConfigError, match=r"attention mask of shape \(batch, tokens\), not \(1, 1, 4, 4\)"):
        mtp_model.train()(tokens, labels=tokens, attention_mask=torch.zeros(1, 1, 4, 4))


def test_mtp_weights_lie_where_deepseek_keeps_them_and_survive(mtp_model, tmp_path):
    mtp_model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    expected = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "mlp.gate.weight",
                "mlp.experts.7.up_proj.weight", "self_attn.kv_b_proj.weight", "input_layernorm.weight"}  # fmt: skip
    assert {f"model.layers.{layer}.{name}" for layer in (3, 4) for name in expected} <= names
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.num_mtp_layers == 2
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in mtp_model.state_dict().items())


def test_copies_of_embedding_and_head_in_the_mtp_layer_are_taken_as_such(mtp_model, tmp_path, caplog):
    mtp_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = HubMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_classes_and_configs_without_mtp_leave_the_weights_alone(mtp_model, tmp_path):
    mtp_model.save_pretrained(tmp_path)
    model, info = HubMoeForCausalLM.from_pretrained(tmp_path, num_mtp_layers=0, output_loading_info=True)
    assert len(model.model.layers) == 3
    assert not info["unexpected_keys"]
    backbone, info = HubMoeModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(backbone.layers) == 3
    assert info["unexpected_keys"] == {"lm_head.weight"}


def test_config_that_promises_mtp_the_checkpoint_lacks_is_corrected_aloud(tmp_path, caplog, monkeypatch):
    save_stock("v3", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    transformers_logger = logging.getLogger("transformers")
    monkeypatch.setattr(transformers_logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = HubMoeForCausalLM.from_pretrained(tmp_path)
    assert "promises 1 MTP layers and the checkpoint holds none" in caplog.text
    assert model.config.num_mtp_layers == 0
    assert len(model.model.layers) == 3


def _counting_task(config):
    """A model that has learnt to count, so that its drafts are worth something."""
    torch.manual_seed(0)
    model = HubMoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        start = torch.randint(2, 60, (8, 1))
        tokens = start + torch.arange(24)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("depth", [1, 2])
def test_drafting_gives_the_same_tokens_in_fewer_steps(tiny_config, depth):
    tiny_config.num_mtp_layers = depth
    model = _counting_task(tiny_config)
    steps = []
    model.model.register_forward_hook(lambda *_: steps.append(1))
    prompt = torch.arange(10, 16)[None]
    greedy = model.generate(prompt, max_new_tokens=24, do_sample=False)
    greedy_steps = len(steps)
    steps.clear()
    drafted = model.generate(prompt, max_new_tokens=24, do_sample=False, use_mtp=True)
    assert torch.equal(drafted, greedy)
    assert len(steps) < 0.75 * greedy_steps


def test_drafts_of_an_untrained_model_change_nothing(mtp_model):
    mtp_model.eval()
    prompt = torch.randint(2, 128, (1, 6))
    greedy = mtp_model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(mtp_model.generate(prompt, max_new_tokens=12, do_sample=False, use_mtp=True), greedy)


def test_drafting_needs_token_ids_and_leaves_the_training_mode_alone(mtp_model):
    with pytest.raises(GenerationError, match="give input_ids rather than inputs_embeds"):
        mtp_model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2, use_mtp=True)
    mtp_model.train().generate(torch.tensor([[5, 6]]), max_new_tokens=2, use_mtp=True)
    assert all(module.training for module in mtp_model.modules())


def test_drafting_without_mtp_layers_is_refused(tiny_model):
    with pytest.raises(GenerationError, match="this model has none"):
        tiny_model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, use_mtp=True)
