"""HubMoe does what every transformers model does: caches, generation, attention and experts backends, placement."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hub_moe.modeling import (
    HubMoeConfig,
    HubMoeForCausalLM,
    HubMoeForSequenceClassification,
    HubMoeForTokenClassification,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
# each attention head's own sizes, softmax and sigmoid routing, with and without q-LoRA
FLAVOURS = {
    "v3": {"q_lora_rank": 24},
    "v2": {"scoring_func": "softmax", "topk_method": "greedy", "rope_in_float32": True},
}


@pytest.fixture(params=FLAVOURS)
def model(request, tiny_config):
    fields = {**tiny_config.to_dict(), **FLAVOURS[request.param]}
    torch.manual_seed(0)
    return HubMoeForCausalLM(HubMoeConfig(**fields)).eval()


def _prompt(rows=2, length=6):
    return torch.randint(2, 128, (rows, length))


def test_cached_logits_equal_uncached(model):
    tokens = _prompt(length=12)
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :7], use_cache=True)
    steps = [first.logits]
    cache = first.past_key_values
    for position in range(7, 12):
        steps.append(model(tokens[:, position : position + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_cache_holds_the_compressed_latent(model):
    cache = model(_prompt(), use_cache=True).past_key_values
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 1, 6, model.config.kv_lora_rank)
    assert layer.values.shape == (2, 1, 6, model.config.qk_rope_head_dim)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_every_cache_generates_the_same_tokens(model, cache):
    prompt = _prompt()
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, **GREEDY, **options, disable_compile=True), expected)


def test_left_padding_changes_nothing(model):
    prompt = _prompt(rows=1)
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), prompt], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(prompt)], dim=1)
    alone = model.generate(prompt, **GREEDY)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 10:], alone)


def test_batched_generation_equals_one_by_one(model):
    prompts = _prompt(rows=3)
    together = model.generate(prompts, **GREEDY)
    alone = torch.cat([model.generate(prompt[None], **GREEDY) for prompt in prompts])
    assert torch.equal(together, alone)


def test_beam_search_is_at_least_as_likely_as_greedy(model):
    prompt = _prompt(rows=1)

    def likelihood(tokens):
        log_probs = model(tokens).logits[:, 5:-1].log_softmax(dim=-1)
        return log_probs.gather(-1, tokens[:, 6:, None]).sum().item()

    beams = model.generate(prompt, num_beams=4, **GREEDY)
    assert likelihood(beams) >= likelihood(model.generate(prompt, **GREEDY)) - 1e-4


def test_sampling_is_reproducible_by_seed(model):
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "eos_token_id": None}
    torch.manual_seed(3)
    first = model.generate(_prompt(), **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(_prompt(), **options), first)


def test_assisted_generation_equals_greedy(model):
    prompt = _prompt(rows=1)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.01)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **GREEDY), expected)


@pytest.mark.filterwarnings("ignore")  # torch compiles flex attention, and warns about itself on the way
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_implementations_agree_with_sdpa(model, attention):
    tokens = _prompt(length=9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation(attention)
        actual = model(tokens, attention_mask=mask).logits
    kept = mask.bool()
    torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["hub_moe", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("num_tokens", [1, 63])
def test_experts_implementations_agree_with_eager(model, implementation, num_tokens):
    tokens = _prompt(rows=1, length=num_tokens)
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_all_tokens_to_the_same_experts(model):
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[:2] = 1.0
    tokens = _prompt(length=16)
    expected = model(tokens).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "implementation", sorted(set(ALL_EXPERTS_FUNCTIONS.keys()) - {"grouped_mm", "batched_mm", "hub_moe"})
)
def test_experts_implementation_that_cannot_run_here_is_an_error(model, implementation):
    if torch.cuda.is_available():
        pytest.skip("these implementations may run on this machine")

    def use():
        model.set_experts_implementation(implementation)
        model(_prompt())

    with pytest.raises((ImportError, ValueError, RuntimeError)):
        use()


def test_unknown_experts_implementation_is_an_error(tiny_config, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"experts_implementation=\"warp\"` is not supported"):
        tiny_model.set_experts_implementation("warp")
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="warp"):
        HubMoeForCausalLM.from_pretrained(tmp_path, experts_implementation="warp")
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"


def test_user_registered_experts_implementation_is_used(model):
    calls = []

    def counting(module, hidden, top_k_index, top_k_weights):
        calls.append(hidden.shape)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, top_k_index, top_k_weights)

    tokens = _prompt()
    model.set_experts_implementation("grouped_mm")
    expected = model(tokens).logits
    ALL_EXPERTS_FUNCTIONS.register("counting", counting)
    model.set_experts_implementation("counting")
    assert torch.equal(model(tokens).logits, expected)
    assert calls == [(12, 32), (12, 32)]


def test_compiled_forward_has_one_graph_and_the_same_logits(model):
    tokens = _prompt()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_can_be_resized(model):
    tokens = _prompt()
    before = model(tokens).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab_size == 140
    torch.testing.assert_close(after[..., :128], before)


def test_tied_embeddings_stay_tied(tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = True
    model = HubMoeForCausalLM(tiny_config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"model": "cpu", "lm_head": "cpu"}])
def test_device_map_places_the_model(model, device_map, tmp_path):
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    tokens = _prompt()
    torch.testing.assert_close(placed(tokens.to(placed.device)).logits.cpu(), model(tokens).logits)


def test_layers_offloaded_to_disk_give_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    on_disk = ("model.layers.1", "model.layers.2")
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(on_disk, "disk"), **dict.fromkeys(on_cpu, "cpu")}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    tokens = _prompt()
    torch.testing.assert_close(offloaded(tokens).logits, model(tokens).logits)


def test_pipeline_generates_text(tiny_model, tiny_tokenizer):
    generate = pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)
    result = generate("A router", max_new_tokens=4, do_sample=False)
    assert result[0]["generated_text"].startswith("A router")


def test_classification_heads_learn(tiny_config):
    tokens = torch.randint(2, 128, (4, 7))
    tiny_config.num_labels = 3
    for head, labels in (
        (HubMoeForSequenceClassification, torch.tensor([0, 1, 2, 1])),
        (HubMoeForTokenClassification, tokens % 3),
    ):
        torch.manual_seed(0)
        model = head(tiny_config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


def test_no_shared_experts_is_a_model_too(tiny_config, tmp_path):
    tiny_config.n_shared_experts = 0
    model = HubMoeForCausalLM(tiny_config).eval()
    assert not any("shared_experts" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    tokens = _prompt()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)
