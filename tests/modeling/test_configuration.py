import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config

from hub_moe.errors import ConfigError, UnsupportedModelError
from hub_moe.modeling import DeepseekConfig, HubMoeConfig
from hub_moe.modeling.presets import PRESETS


def test_unknown_key_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"Unknown key 'num_expert_per_tok'.*did you mean 'num_experts_per_tok'"):
        HubMoeConfig(num_expert_per_tok=2)


def test_unknown_key_in_config_json_is_refused(tmp_path):
    config = HubMoeConfig().to_dict() | {"colour": "blue"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Unknown key 'colour'"):
        HubMoeConfig.from_pretrained(tmp_path)


def test_attribute_that_is_no_field_is_not_saved(tmp_path):
    config = HubMoeConfig()
    config.my_note = "for me"
    config.save_pretrained(tmp_path)
    assert config.my_note == "for me"
    assert not hasattr(HubMoeConfig.from_pretrained(tmp_path), "my_note")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_group=3 must divide n_routed_experts=256"),
        ({"n_group": 0}, "n_group=0 must divide"),
        ({"n_group": 256}, "needs at least 2"),
        ({"topk_group": 9}, "topk_group=9 must lie between 1 and n_group=8"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok=257 must lie between 1 and n_routed_experts=256"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must lie between"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax', which allows 'greedy' or 'group_limited_greedy'"),
        ({"topk_method": "greedy"}, "scoring_func='sigmoid', which allows 'noaux_tc'"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1 must equal num_attention_heads=128"),
        ({"qk_rope_head_dim": 7}, "even rotary dimension"),
        ({"moe_layer_freq": 0}, "moe_layer_freq=0 must be at least 1"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"aux_loss_alpha": -1.0}, "aux_loss_alpha=-1.0 must be a number from 0 on"),
        ({"aux_loss_alpha": float("nan")}, "aux_loss_alpha=nan must be a number from 0 on"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor=inf must be finite"),
        ({"hidden_size": -8}, "hidden_size=-8 must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"hidden_size": "big"}, "hidden_size"),
    ],
)
def test_impossible_fields_are_named(changes, message):
    with pytest.raises((ConfigError, StrictDataclassError), match=message):
        HubMoeConfig(**changes)


def test_field_changed_after_loading_is_checked_when_the_model_is_built(tiny_config):
    from hub_moe.modeling import HubMoeModel

    tiny_config.num_experts_per_tok = 99
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok=99"):
        HubMoeModel(tiny_config)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name, tmp_path):
    config = HubMoeConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reloaded, HubMoeConfig)
    assert reloaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_whole_number_is_a_weight_too():
    assert HubMoeConfig(aux_loss_alpha=0, mtp_loss_coef=1).mtp_loss_coef == 1


def test_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match=r"No preset 'huge'; the presets are nano, tiny, small"):
        HubMoeConfig.from_preset("huge")


def test_native_file_gets_the_native_defaults_for_what_it_leaves_out(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2", "num_experts_per_tok": 6}')
    config = HubMoeConfig.from_pretrained(tmp_path)
    stock = DeepseekV2Config(num_experts_per_tok=6)
    assert (config.hidden_size, config.vocab_size, config.kv_lora_rank) == (
        stock.hidden_size,
        stock.vocab_size,
        stock.kv_lora_rank,
    )
    assert (config.scoring_func, config.topk_method, config.num_mtp_layers) == ("softmax", "greedy", 0)


def test_deepseek_v3_release_file_is_understood(tmp_path):
    released = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "model_type": "deepseek_v3",
        "moe_layer_freq": 1,
        "n_group": 8,
        "num_nextn_predict_layers": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
                         "beta_slow": 1, "original_max_position_embeddings": 4096},
        "rope_theta": 10000,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = HubMoeConfig.from_pretrained(tmp_path)
    assert config.num_mtp_layers == 1
    assert config.aux_loss_alpha == 0.001
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 40
    assert "ep_size" not in config.to_dict()


def test_misspelt_key_of_a_native_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3", "n_routed_expert": 8}')
    with pytest.raises(ConfigError, match=r"'n_routed_expert'.*did you mean 'n_routed_experts'"):
        HubMoeConfig.from_pretrained(tmp_path)


def test_foreign_model_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="model_type 'llama' is not one HubMoe loads"):
        HubMoeConfig.from_pretrained(tmp_path)


def test_mtp_layers_are_spelt_as_deepseek_spells_them_on_disk(tmp_path):
    HubMoeConfig(num_mtp_layers=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_nextn_predict_layers"] == 2
    assert "num_mtp_layers" not in saved
    assert HubMoeConfig.from_pretrained(tmp_path).num_mtp_layers == 2


def test_v1_config_checks_its_experts():
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok=9 must lie between 1 and n_routed_experts=8"):
        DeepseekConfig(n_routed_experts=8, num_experts_per_tok=9)
    with pytest.raises(ConfigError, match=r"'n_routed_expert'"):
        DeepseekConfig(n_routed_expert=8)


def test_stock_config_defaults_are_untouched():
    assert DeepseekV3Config().num_mtp_layers == 1
