import pytest
import torch
from transformers import Trainer, TrainingArguments

from hub_moe.anatomy import find_moe_layers
from hub_moe.data import BlockDataset
from hub_moe.errors import UnsupportedModelError
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.training import BalancingCallback, LoadCounter, measure_imbalance, update_balancing_bias


def _tokens(rows, length, seed=0):
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def _train(model, rows, folder, callback, *, steps=2, **arguments):
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=BlockDataset(rows),
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def _count_by_hand(model, tokens_BL, mask_BL=None):
    """Load of each layer from the routers' own outputs, in eval mode, one forward."""
    chosen = []
    hooks = [
        layer.router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
        for layer in find_moe_layers(model)
    ]
    with torch.no_grad():
        model.eval()(tokens_BL, attention_mask=mask_BL)
    for hook in hooks:
        hook.remove()
    keep_T = torch.ones(tokens_BL.numel(), dtype=torch.bool) if mask_BL is None else mask_BL.flatten().bool()
    return torch.stack([torch.bincount(chosen_TK[keep_T].flatten(), minlength=8) for chosen_TK in chosen])


def test_the_bias_rises_below_the_mean_load_and_falls_above_it():
    bias_E = update_balancing_bias(torch.tensor([0.5, 0.0, 0.0, 0.0]), torch.tensor([10, 2, 6, 6]), 0.1)
    assert torch.allclose(bias_E, torch.tensor([0.4, 0.1, 0.0, 0.0]))


def test_the_bias_is_float32_whatever_it_was():
    assert update_balancing_bias(torch.zeros(2).bfloat16(), torch.tensor([1, 3]), 0.001).dtype == torch.float32


def test_imbalance_is_one_when_even_and_the_number_of_experts_when_one_does_everything():
    loads_NE = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]])
    assert measure_imbalance(loads_NE).tolist() == [1.0, 4.0, 1.0]


def test_the_bias_evens_out_a_skewed_stream():
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.linspace(-0.3, 0.3, 8)
    bias_E = torch.zeros(8)
    imbalances = []
    for _ in range(300):
        scores_TE = (torch.randn(256, 8, generator=generator) + 3 * skew_E).sigmoid()
        chosen_TK = (scores_TE + bias_E).topk(2).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=8)
        imbalances.append(measure_imbalance(load_E).item())
        bias_E = update_balancing_bias(bias_E, load_E, 0.005)
    assert sum(imbalances[:10]) / 10 > 2
    assert sum(imbalances[-50:]) / 50 < 1.25


def test_training_counts_every_token_of_every_layer(tiny_model):
    tokens_BL = _tokens(3, 10)
    expected_NE = _count_by_hand(tiny_model, tokens_BL)
    counter = LoadCounter(tiny_model, find_moe_layers(tiny_model))
    tiny_model.train()(tokens_BL)
    assert torch.equal(torch.stack(counter.take()), expected_NE)
    assert sum(load_E.sum() for load_E in counter.take()) == 0


def test_padding_is_not_counted(tiny_model):
    tokens_BL = _tokens(3, 10)
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    mask_BL[2, 7:] = 0
    expected_NE = _count_by_hand(tiny_model, tokens_BL, mask_BL)
    counter = LoadCounter(tiny_model, find_moe_layers(tiny_model))
    tiny_model.train()(tokens_BL, attention_mask=mask_BL)
    assert torch.equal(torch.stack(counter.take()), expected_NE)
    assert expected_NE.sum(-1).tolist() == [2 * 23, 2 * 23]


def test_mtp_layers_are_counted_by_what_they_see(tiny_config):
    tiny_config.num_mtp_layers = 1
    model = HubMoeForCausalLM(tiny_config).train()
    tokens_BL = _tokens(2, 10)
    mask_BL = torch.ones_like(tokens_BL)
    mask_BL[0, :4] = 0
    counter = LoadCounter(model, find_moe_layers(model))
    model(tokens_BL, attention_mask=mask_BL, labels=tokens_BL)
    assert [load_E.sum() for load_E in counter.take()] == [2 * 16, 2 * 16, 2 * 14]


def test_evaluation_and_a_closed_counter_count_nothing(tiny_model):
    counter = LoadCounter(tiny_model, find_moe_layers(tiny_model))
    tiny_model.eval()(_tokens(1, 5))
    counter.close()
    tiny_model.train()(_tokens(1, 5))
    assert sum(load_E.sum() for load_E in counter.take()) == 0


def test_a_mask_that_does_not_name_the_padding_is_an_error(tiny_model):
    LoadCounter(tiny_model, find_moe_layers(tiny_model))
    with pytest.raises(UnsupportedModelError, match=r"attention_mask of shape \(batch, length\)"):
        tiny_model.train()(_tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5))


def test_one_token_and_an_idle_expert_are_counted(tiny_model):
    counter = LoadCounter(tiny_model, find_moe_layers(tiny_model))
    tiny_model.train()(_tokens(1, 1))
    assert [load_E.sum() for load_E in counter.take()] == [2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_accumulation_and_checkpointing_count_each_token_once_and_update_once(tiny_model, tmp_path, reentrant):
    callback = BalancingCallback(speed=0.001, window_steps=1)
    tiny_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    _train(tiny_model, _tokens(16, 8), tmp_path, callback, gradient_accumulation_steps=4)
    tokens_per_step, experts_per_token = 4 * 2 * 8, 2
    loads_WNE = torch.tensor(callback.history)
    assert loads_WNE.sum(-1).tolist() == [[tokens_per_step * experts_per_token] * 2] * 2
    for layer in find_moe_layers(tiny_model):
        steps_E = layer.router.e_score_correction_bias / 0.001
        assert torch.allclose(steps_E, steps_E.round(), atol=1e-3)
        assert steps_E.abs().max() <= 2


def test_balancing_frees_an_expert_that_every_token_chose(tiny_config, tmp_path):
    def final_imbalance(speed):
        torch.manual_seed(0)
        model = HubMoeForCausalLM(tiny_config)
        for layer in find_moe_layers(model):
            layer.router.e_score_correction_bias[3] = 0.5
        callback = BalancingCallback(speed=speed, window_steps=10)
        _train(model, _tokens(64, 16), tmp_path, callback, steps=40)
        return callback.imbalance()

    assert final_imbalance(0.0) == pytest.approx(4.0)
    assert final_imbalance(0.02) < 2.0


def test_the_bias_of_a_bf16_model_is_float32(tiny_model, tmp_path):
    _train(tiny_model.bfloat16(), _tokens(8, 8), tmp_path, BalancingCallback())
    biases = [layer.router.e_score_correction_bias for layer in find_moe_layers(tiny_model)]
    assert {bias_E.dtype for bias_E in biases} == {torch.float32}
    assert all(bias_E.abs().max() > 0 for bias_E in biases)


def test_a_router_without_a_bias_is_an_error(tiny_config, tmp_path):
    tiny_config.scoring_func, tiny_config.topk_method = "softmax", "greedy"
    with pytest.raises(UnsupportedModelError, match="no balancing bias"):
        _train(HubMoeForCausalLM(tiny_config), _tokens(4, 8), tmp_path, BalancingCallback())
