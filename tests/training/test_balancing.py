from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hub_moe.anatomy import find_moe_layers
from hub_moe.data import BlockDataset
from hub_moe.errors import ConfigError, UnsupportedModelError
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.training import BalancingCallback, LoadCounter, measure_imbalance, update_balancing_bias

from ..anatomy.families import tiny_config as family_config


def _tokens(rows, length, seed=0):
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def _trainer(model, rows, folder, *callbacks, steps=2, **arguments):
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=BlockDataset(rows),
        callbacks=list(callbacks),
    )


def _train(model, rows, folder, *callbacks, **arguments):
    trainer = _trainer(model, rows, folder, *callbacks, **arguments)
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


def _biases(model):
    return [layer.balancing_bias.clone() for layer in find_moe_layers(model)]


@pytest.mark.parametrize("model_type", ["hub_moe", "deepseek_v3", "glm4_moe"])
def test_every_family_with_a_bias_is_balanced(model_type, tmp_path):
    model = AutoModelForCausalLM.from_config(family_config(model_type))
    for layer in find_moe_layers(model):
        layer.balancing_bias[3] = 0.5
    callback = BalancingCallback(speed=0.02, window_steps=10)
    _train(model, _tokens(64, 16), tmp_path, callback, steps=40)
    assert callback.imbalance() < 2.5 < measure_imbalance(torch.tensor(callback.history[0])).max()


def test_the_speed_is_zero_for_the_end_of_the_steps(tiny_model, tmp_path):
    kept = _KeepBiases()
    _train(tiny_model, _tokens(64, 8), tmp_path, BalancingCallback(stop_at=0.5), kept, steps=8)
    moved = [not torch.equal(before[0], after[0]) for before, after in pairwise(kept.biases)]
    assert moved == [True, True, True, False, False, False, False]  # of steps 2 to 8; the first 4 move


def test_the_speed_is_zero_after_the_tokens(tiny_model, tmp_path):
    kept, callback = _KeepBiases(), BalancingCallback(stop_after_tokens=3 * 16)
    _train(tiny_model, _tokens(64, 8), tmp_path, callback, kept, steps=5)
    moved = [not torch.equal(before[0], after[0]) for before, after in pairwise(kept.biases)]
    assert moved == [True, True, False, False]
    assert callback.tokens == 5 * 16


class _KeepBiases(TrainerCallback):
    def __init__(self):
        self.biases = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.biases.append(_biases(model))


@pytest.mark.parametrize("wrong", [{"speed": -1}, {"stop_at": 1.5}, {"stop_after_tokens": -1}, {"window_steps": 0}])
def test_settings_out_of_range_are_an_error(wrong):
    with pytest.raises(ConfigError, match="Balancing with speed="):
        BalancingCallback(**wrong)


@pytest.mark.parametrize("model_type", ["hub_moe", "deepseek_v3", "glm4_moe"])
def test_centring_the_bias_leaves_the_routing_as_it_was(model_type, tmp_path):
    def train(is_centred):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(model_type))
        callback = BalancingCallback(speed=0.01, is_centred=is_centred, window_steps=1)
        trainer = _train(model, _tokens(16, 8), tmp_path, callback, steps=6, logging_steps=1)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return callback.history, losses, torch.stack(_biases(model))

    (history, losses, biases_NE), (centred_history, centred_losses, centred_NE) = train(False), train(True)
    assert centred_history == history
    assert centred_losses == losses
    assert centred_NE.mean(dim=-1).abs().max() < 1e-6 < biases_NE.mean(dim=-1).abs().max()
    assert torch.allclose(biases_NE - biases_NE.mean(dim=-1, keepdim=True), centred_NE, atol=1e-6)


def test_a_step_that_loss_scaling_skips_moves_nothing(tiny_model, tmp_path):
    callback = BalancingCallback(speed=0.01)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(max_steps=4), TrainerControl()
    Accelerator(cpu=True)  # sets up what the next line relies on
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD(tiny_model.parameters(), lr=0.0), scaler=scaler)
    callback.on_train_begin(args, state, control, model=tiny_model.train())
    for is_skipped in (True, False):
        before = _biases(tiny_model)
        scaler.scale(tiny_model(_tokens(2, 8), labels=_tokens(2, 8)).loss).backward()
        if is_skipped:
            tiny_model.lm_head.weight.grad[0, 0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped == is_skipped
        callback.on_optimizer_step(args, state, control, model=tiny_model, optimizer=optimizer)
        assert torch.equal(before[0], _biases(tiny_model)[0]) == is_skipped
        optimizer.zero_grad()
    callback.close()


def test_a_training_forward_without_gradients_is_not_counted(tiny_model):
    counter = LoadCounter(tiny_model, find_moe_layers(tiny_model))
    with torch.no_grad():
        tiny_model.train()(_tokens(1, 5))
    assert sum(load_E.sum() for load_E in counter.take()) == 0


def test_packed_documents_are_told_apart_by_their_positions(tiny_config):
    tiny_config.num_mtp_layers = 1
    model = HubMoeForCausalLM(tiny_config).train()
    tokens_BL = _tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    counter = LoadCounter(model, find_moe_layers(model))
    output = model(tokens_BL, position_ids=positions, labels=tokens_BL, output_router_logits=True)
    assert torch.equal(torch.stack(counter.take()), output.expert_load)
    assert counter.mean_length() == 5.0


def test_layers_may_differ_in_their_number_of_experts(tiny_model):
    layers = find_moe_layers(tiny_model)
    wider = replace(layers[1], num_experts=11)
    counter = LoadCounter(tiny_model, [layers[0], wider])
    tiny_model.train()(_tokens(2, 5))
    assert [(len(load_E), load_E.sum()) for load_E in counter.take()] == [(8, 20), (11, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_biases_and_the_windows_of_one_that_went_through(tiny_config, tmp_path, dtype):
    def train(folder, steps, **kwargs):
        torch.manual_seed(0)
        model = HubMoeForCausalLM(tiny_config).to(dtype)
        callback = BalancingCallback(speed=0.0123, stop_after_tokens=90, window_steps=4)
        trainer = _trainer(model, _tokens(32, 8), folder, callback, steps=8, save_strategy="steps", save_steps=3)
        trainer.add_callback(_StopAt(steps))
        trainer.train(**kwargs)
        return callback, _biases(model)

    through, biases = train(tmp_path / "through", 8)
    train(tmp_path / "stopped", 3)
    resumed, resumed_biases = train(tmp_path / "stopped", 8, resume_from_checkpoint=True)
    assert resumed.history == through.history
    assert len(through.history) == 2
    assert resumed.tokens == through.tokens == 8 * 16
    assert all(torch.equal(*pair) for pair in zip(biases, resumed_biases, strict=True))


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def test_a_callback_that_comes_too_late_for_a_narrow_bias_says_so(tiny_model, tmp_path):
    trainer = _train(tiny_model.bfloat16(), _tokens(8, 8), tmp_path, BalancingCallback(), save_strategy="steps")
    late = _trainer(trainer.model.bfloat16(), _tokens(8, 8), tmp_path, _KeepBiases(), steps=4)
    late.add_callback(BalancingCallback())
    with pytest.raises(UnsupportedModelError, match=r"torch.bfloat16 while a checkpoint was read"):
        late.train(resume_from_checkpoint=True)


def test_training_leaves_no_hooks(tiny_model, tmp_path):
    _train(tiny_model, _tokens(4, 8), tmp_path, BalancingCallback())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())


@pytest.mark.parametrize(
    ("model_type", "instead"), [("qwen3_moe", "router_aux_loss_coef"), ("deepseek_v2", "without a BalancingCallback")]
)
def test_a_family_without_a_bias_is_an_error_that_says_what_to_use(model_type, instead, tmp_path):
    model = AutoModelForCausalLM.from_config(family_config(model_type))
    with pytest.raises(UnsupportedModelError, match=f"{model_type!r} has no balancing bias .*{instead}"):
        _trainer(model, _tokens(4, 8), tmp_path, BalancingCallback())


def test_a_router_without_a_bias_is_an_error(tiny_config, tmp_path):
    tiny_config.scoring_func, tiny_config.topk_method = "softmax", "greedy"
    with pytest.raises(UnsupportedModelError, match="no balancing bias"):
        _train(HubMoeForCausalLM(tiny_config), _tokens(4, 8), tmp_path, BalancingCallback())
