import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, record_routing
from hub_moe.errors import UnsupportedModelError

from .families import FAMILIES, tiny_config


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


def random_tokens(rows, length, seed=0):
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded_mask(tokens_BL):
    """Left padding in the first row, right padding in the last."""
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    mask_BL[-1, -3:] = 0
    return mask_BL


def call(model, tokens_BL, mask_BL=None, **kwargs):
    with torch.no_grad():
        return model(tokens_BL, attention_mask=mask_BL, **kwargs)


def by_hand(model, tokens_BL, mask_BL=None):
    """`(tokens, gate mass, output norm, gated output norm)` of each layer, pair by pair, from one expert's own rows."""
    kept_T = torch.ones(tokens_BL.numel(), dtype=torch.bool) if mask_BL is None else mask_BL.flatten().bool()
    seen, sums = [], []
    layers = find_moe_layers(model)
    hooks = [
        layer.experts.register_forward_pre_hook(lambda experts, inputs: seen.append((experts, *inputs)))
        for layer in layers
    ]
    call(model, tokens_BL, mask_BL)
    for hook in hooks:
        hook.remove()
    for experts, hidden_TD, chosen_TK, weights_TK in seen:
        totals = torch.zeros(4, 8, dtype=torch.float64)
        for token in kept_T.nonzero()[:, 0].tolist():
            for expert, weight in zip(chosen_TK[token].tolist(), weights_TK[token].tolist(), strict=True):
                with torch.no_grad():
                    output = experts.forward(hidden_TD[[token]], torch.tensor([[expert]]), torch.ones(1, 1))
                norm = output.norm().item()
                totals[:, expert] += torch.tensor([1.0, weight, norm, weight * norm], dtype=torch.float64)
        sums.append(totals)
    return sums


def assert_recorded(routing, expected):
    assert len(routing.layers) == len(expected)
    for layer, (tokens_E, gate_mass_E, norm_E, gated_norm_E) in zip(routing.layers, expected, strict=True):
        assert layer.tokens_E.dtype == torch.int64
        assert layer.gate_mass_E.dtype == torch.float64
        assert torch.equal(layer.tokens_E, tokens_E.long())
        torch.testing.assert_close(layer.gate_mass_E, gate_mass_E, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.output_norm_E, norm_E, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.gated_output_norm_E, gated_norm_E, rtol=1e-4, atol=1e-7)


def counts(routing):
    return [layer.tokens_E.tolist() for layer in routing.layers]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_recorded_without_its_padding(model_type):
    model, tokens_BL = build(model_type), random_tokens(3, 10)
    mask_BL = padded_mask(tokens_BL)
    expected = by_hand(model, tokens_BL, mask_BL)
    with record_routing(model, output_norms=True) as routing:
        call(model, tokens_BL, mask_BL)

    assert_recorded(routing, expected)
    assert {int(layer.tokens_E.sum()) for layer in routing.layers} == {2 * (30 - 7)}
    call(model, tokens_BL)
    assert {int(layer.tokens_E.sum()) for layer in routing.layers} == {2 * (30 - 7)}


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "hub_moe"])
@pytest.mark.parametrize("model_type", ["hub_moe", "qwen3_moe", "gpt_oss"])
def test_norms_are_the_same_by_every_experts_implementation(model_type, implementation):
    model, tokens_BL = build(model_type), random_tokens(2, 6)
    expected = by_hand(model, tokens_BL)
    model.set_experts_implementation(implementation)
    with record_routing(model, output_norms=True) as routing:
        call(model, tokens_BL)

    assert_recorded(routing, expected)


def test_recording_changes_no_output():
    model, tokens_BL = build("hub_moe"), random_tokens(2, 6)
    before = call(model, tokens_BL).logits
    with record_routing(model, keep_choices=True, output_norms=True):
        during = call(model, tokens_BL).logits

    assert torch.equal(during, before)
    assert torch.equal(call(model, tokens_BL).logits, before)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False, None])
@pytest.mark.parametrize("model_type", ["hub_moe", "olmoe", "gpt_oss"])
def test_checkpointing_counts_each_token_once_and_changes_no_gradient(model_type, reentrant, is_training):
    def gradients(model):
        model.zero_grad()
        model(tokens_BL, attention_mask=mask_BL, labels=tokens_BL, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model, tokens_BL = build(model_type), random_tokens(2, 9)
    mask_BL = padded_mask(tokens_BL)
    with record_routing(model) as evaluated:
        call(model, tokens_BL, mask_BL)
    model.train(is_training)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    expected = gradients(model)
    with record_routing(model, output_norms=True) as routing:
        during = gradients(model)

    assert counts(routing) == counts(evaluated)
    assert all(torch.equal(a, b) for a, b in zip(during, expected, strict=True))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generating_counts_the_prompt_once_and_each_new_token_once(model_type):
    model, tokens_BL = build(model_type), random_tokens(2, 6)
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    with record_routing(model) as routing:
        model.generate(
            tokens_BL, attention_mask=mask_BL, min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=1
        )

    assert {int(layer.tokens_E.sum()) for layer in routing.layers} == {2 * ((12 - 4) + 2 * 4)}


def test_decoding_routes_as_one_forward_over_everything_does():
    model, tokens_BL = build("hub_moe"), random_tokens(1, 6)
    with record_routing(model, keep_choices=True) as decoded:
        written_BL = model.generate(tokens_BL, min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=1)
    with record_routing(model, keep_choices=True) as at_once:
        call(model, written_BL[:, :-1])

    assert counts(decoded) == counts(at_once)
    for layer, other in zip(decoded.layers, at_once.layers, strict=True):
        assert torch.equal(torch.cat(layer.choices).sort().values, torch.cat(other.choices).sort().values)


def test_packed_rows_count_whole_and_route_as_their_documents_alone():
    model = build("qwen3_moe")
    documents = [random_tokens(1, length, seed=length) for length in (5, 3, 7)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with record_routing(model) as apart:
        for document in documents:
            call(model, document)
    with record_routing(model) as packed:
        call(model, torch.cat(documents, dim=1), position_ids=positions, use_cache=False)

    assert counts(packed) == counts(apart)
    assert sum(counts(packed)[0]) == 2 * 15


def test_choices_are_those_of_the_router_with_minus_one_at_padding():
    model, tokens_BL = build("deepseek_v3"), random_tokens(3, 10)
    mask_BL = padded_mask(tokens_BL)
    chosen = []
    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
    with record_routing(model, keep_choices=True) as routing:
        call(model, tokens_BL, mask_BL)

    kept_T = mask_BL.flatten().bool()
    for layer, chosen_TK in zip(routing.layers, chosen, strict=True):
        [choices_TK] = layer.choices
        assert torch.equal(choices_TK[kept_T], chosen_TK[kept_T].int())
        assert (choices_TK[~kept_T] == -1).all()


def test_choices_and_norms_are_not_kept_unasked():
    model = build("olmoe")
    with record_routing(model) as routing:
        call(model, random_tokens(1, 3))

    assert [layer.choices for layer in routing.layers] == [None] * 3
    assert [layer.output_norm_E for layer in routing.layers] == [None] * 3


def test_nothing_is_recorded_in_a_pause_and_pauses_nest():
    model = build("olmoe")
    with record_routing(model) as routing:
        with routing.pause():
            with routing.pause():
                call(model, random_tokens(1, 3))
            call(model, random_tokens(1, 3), torch.ones(1, 1, 3, 3))
        assert counts(routing) == [[0] * 8] * 3
        call(model, random_tokens(1, 3))

    assert sum(counts(routing)[0]) == 2 * 3


def test_the_decoder_alone_and_a_positional_mask_are_recorded_too():
    model, tokens_BL = build("mixtral"), random_tokens(3, 10)
    mask_BL = padded_mask(tokens_BL)
    with record_routing(model) as expected:
        call(model, tokens_BL, mask_BL)
    with record_routing(model) as routing, torch.no_grad():
        model.model(tokens_BL, mask_BL)
    with record_routing(model) as positional, torch.no_grad():
        model(tokens_BL, mask_BL)

    assert counts(routing) == counts(positional) == counts(expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft 0.21
def test_a_model_that_peft_wraps_is_recorded_however_it_is_called():
    model, tokens_BL = build("qwen3_moe"), random_tokens(2, 6)
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :2] = 0
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    calls = [
        (lambda: call(wrapped, tokens_BL, mask_BL), 10),
        (lambda: wrapped(tokens_BL, mask_BL), 10),
        (lambda: wrapped.base_model.model(tokens_BL, mask_BL), 10),
        (lambda: wrapped.generate(input_ids=tokens_BL, attention_mask=mask_BL, max_new_tokens=1, pad_token_id=1), 10),
    ]
    for forward, num_tokens in calls:
        with record_routing(wrapped) as routing:
            forward()
        assert [sum(counts_E) for counts_E in counts(routing)] == [2 * num_tokens] * 3


def test_two_recordings_of_one_model_do_not_disturb_each_other():
    model = build("olmoe")
    with record_routing(model) as outer:
        with record_routing(model, output_norms=True) as inner:
            call(model, random_tokens(1, 3))
        call(model, random_tokens(1, 4))

    assert [sum(counts(routing)[0]) for routing in (outer, inner)] == [2 * 7, 2 * 3]


def test_inference_mode_and_training_add_up():
    model, tokens_BL = build("hub_moe"), random_tokens(1, 4)
    with torch.inference_mode(), record_routing(model, keep_choices=True, output_norms=True) as routing:
        model(tokens_BL)
    with record_routing(model, output_norms=True) as routing:
        with torch.inference_mode():
            model(tokens_BL)
        model.train()(tokens_BL, labels=tokens_BL).loss.backward()

    assert sum(counts(routing)[0]) == 2 * 8


def test_mtp_layers_are_counted_by_what_they_see():
    model, tokens_BL = build("hub_moe", num_mtp_layers=1).train(), random_tokens(2, 10)
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    with record_routing(model) as routing:
        model(tokens_BL, attention_mask=mask_BL, labels=tokens_BL)

    assert [int(layer.tokens_E.sum()) for layer in routing.layers] == [2 * 16, 2 * 16, 2 * 15]


def test_padding_that_is_not_a_number_counts_as_nothing():
    model = build("mixtral")
    weights_TK = torch.tensor([[torch.nan, torch.nan], [0.75, 0.25]])
    with record_routing(model, output_norms=True) as routing:
        routing.layers[0].add(
            torch.tensor([[3, 5], [3, 0]]), weights_TK, kept_T=torch.tensor([False, True]), norms_TK=weights_TK
        )

    assert routing.layers[0].tokens_E.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert routing.layers[0].gate_mass_E.tolist() == [0.25, 0, 0, 0.75, 0, 0, 0, 0]
    assert routing.layers[0].gated_output_norm_E.tolist() == [0.0625, 0, 0, 0.5625, 0, 0, 0, 0]


def test_one_token_and_experts_nobody_chose_are_recorded():
    model = build("deepseek_v2")
    with record_routing(model, output_norms=True) as routing:
        call(model, random_tokens(1, 1))

    for layer in routing.layers:
        idle_E = layer.tokens_E == 0
        assert (int(layer.tokens_E.sum()), int(idle_E.sum())) == (2, 6)
        assert torch.equal(layer.output_norm_E == 0, idle_E)


def test_norms_are_measured_in_portions(monkeypatch):
    monkeypatch.setattr("hub_moe.anatomy.routing._PAIRS_AT_ONCE", 5)
    model, tokens_BL = build("glm4_moe"), random_tokens(1, 7)
    expected = by_hand(model, tokens_BL)
    with record_routing(model, output_norms=True) as routing:
        call(model, tokens_BL)

    assert_recorded(routing, expected)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 5, 5), {"full_attention": torch.ones(1, 1, 5, 5)}])
def test_a_mask_that_does_not_name_the_padding_is_an_error_and_the_next_forward_counts(mask):
    model = build("hub_moe")
    with record_routing(model) as routing:
        with pytest.raises(UnsupportedModelError, match=r"attention_mask of shape \(batch, length\)"):
            call(model, random_tokens(1, 5), mask)
        call(model, random_tokens(1, 5))

    assert sum(counts(routing)[0]) == 2 * 5


def test_an_error_in_the_context_leaves_no_hooks():
    model = build("hub_moe")
    with pytest.raises(RuntimeError, match="on purpose"), record_routing(model):
        raise RuntimeError("on purpose")

    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_experts_that_are_given_something_else_are_an_error_that_names_the_type():
    model = build("olmoe")
    layer = find_moe_layers(model)[0]
    layer.experts.register_forward_pre_hook(lambda _module, inputs: (inputs[0], inputs[2], inputs[1]))
    with record_routing(model), pytest.raises(UnsupportedModelError, match=r"'olmoe' gives the experts of model\.laye"):
        call(model, random_tokens(1, 3))


def test_a_dense_model_is_an_error_that_names_its_type():
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match="'llama' has no routed experts"), record_routing(model):
        pass


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for():
    model, tokens_BL = build("hub_moe").cuda(), random_tokens(3, 10).cuda()
    mask_BL = padded_mask(tokens_BL)
    call(model, tokens_BL, mask_BL)
    with record_routing(model, keep_choices=True) as routing:
        call(model, tokens_BL, mask_BL)  # the first one moves the sums
        inputs = [torch.rand(30, 32).cuda(), torch.zeros(30, 2).long().cuda(), torch.rand(30, 2).cuda()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            routing.layers[0].add(inputs[1], inputs[2], kept_T=mask_BL.flatten().bool(), norms_TK=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert {layer.tokens_E.device.type for layer in routing.layers} == {"cuda"}
    assert int(routing.layers[1].tokens_E.sum()) == 2 * 23
