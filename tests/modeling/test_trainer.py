"""transformers' Trainer with our models: it resumes from per-expert files, and evaluates the plain loss."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from hub_moe.errors import CheckpointError
from hub_moe.modeling import HubMoeForCausalLM


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 128, (24, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def _train(config, rows, folder, *, resume=None, max_steps=6):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = Trainer(model=HubMoeForCausalLM(config), args=arguments, train_dataset=rows, eval_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def _losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_resumed_training_equals_uninterrupted_training(tiny_config, rows, tmp_path):
    tiny_config.num_mtp_layers = 1
    tiny_config.aux_loss_alpha = 0.01
    whole = _train(tiny_config, rows, tmp_path / "whole")
    _train(tiny_config, rows, tmp_path / "parts", max_steps=3)
    resumed = _train(tiny_config, rows, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert _losses(resumed) == _losses(whole)
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())


def test_evaluation_loss_is_the_plain_next_token_loss(tiny_config, rows, tmp_path):
    tiny_config.aux_loss_alpha = 10.0
    trainer = _train(tiny_config, rows, tmp_path)
    with torch.no_grad():
        tokens = torch.stack([row["input_ids"] for row in rows])
        logits = trainer.model(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def other_model(tiny_model):
    torch.manual_seed(1)
    return HubMoeForCausalLM(tiny_model.config)


def test_state_dict_with_names_on_disk_loads_strictly(tiny_model, other_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    result = other_model.load_state_dict(tensors, strict=True)
    assert not result.missing_keys
    _assert_equal_weights(other_model, tiny_model)
    tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks 'model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight'"):
        other_model.load_state_dict(tensors, strict=True)
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(16, 32)
    with pytest.raises(CheckpointError, match=r"experts\.8\.up_proj\.weight' is superfluous"):
        other_model.load_state_dict(tensors, strict=False)


def _assert_equal_weights(model, expected):
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


def test_shards_that_cut_through_a_layer_are_resumed_from(tiny_model, other_model, tmp_path):
    """Trainer loads shard after shard; a layer's experts may lie in two of them."""
    tiny_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    load_sharded_checkpoint(other_model, str(tmp_path), strict=False)
    _assert_equal_weights(other_model, tiny_model)


def test_state_dict_fills_a_meta_model(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = HubMoeForCausalLM(tiny_model.config)
    empty.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True, assign=True)
    assert {parameter.device.type for parameter in empty.parameters()} == {"cpu"}
    _assert_equal_weights(empty, tiny_model)


def test_experts_of_layers_the_model_lacks_are_unexpected_keys(tiny_model, other_model):
    result = other_model.load_state_dict({"model.layers.9.mlp.experts.0.up_proj.weight": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["model.layers.9.mlp.experts.0.up_proj.weight"]
