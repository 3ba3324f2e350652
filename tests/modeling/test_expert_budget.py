"""Models whose experts stay in their files: the same logits, within the memory that was given, and clear refusals."""

import copy
import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hub_moe
from hub_moe.anatomy import ExpertProfile, find_moe_layers, record_routing
from hub_moe.errors import CheckpointError, ConfigError, UnsupportedModelError
from hub_moe.experts.offload import PlacedExperts, count_reads, parse_budget
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM, HubMoeForSequenceClassification
from tests.experts.apart import with_experts_apart
from tests.experts.sizes import MANY_EXPERTS

EXPERT = 3 * 16 * 32 * 4  # bytes of one of the 16 experts of the tiny model in float32
TOKENS = torch.arange(34).view(2, 17) * 7 % 128


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def _profile(model, tokens=TOKENS):
    with torch.no_grad(), record_routing(model) as routing:
        model(tokens)
    return ExpertProfile.from_routing(routing, model="tiny", domain="text", dataset={}, num_sequences=len(tokens))


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GiB", 6 * 2**30), ("1.5 gib", 3 * 2**29), ("512MB", 512 * 10**6), ("7kB", 7000), ("80B", 80), (4096, 4096)],
)
def test_budgets_are_read(text, size):
    assert parse_budget(text) == size


@pytest.mark.parametrize(
    "text", ["", "6", "GiB", "six GiB", "-1GiB", "1,5GiB", "6GiBs", "0GiB", 0, -5, True, 2.5, None]
)
def test_what_is_no_budget_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError, match=r"^expert_budget is .*; a size such as '6GiB'"):
        parse_budget(text)


@pytest.mark.parametrize("implementation", ["hub_moe", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [2, 3, 4, 7, 8, 15])
@torch.no_grad()
def test_logits_are_bit_equal_whatever_the_budget(saved, implementation, dtype, experts):
    options = {"dtype": dtype, "experts_implementation": implementation}
    whole = HubMoeForCausalLM.from_pretrained(saved, **options)
    apart = with_experts_apart(HubMoeForCausalLM.from_pretrained(saved, **options))
    budget = experts * EXPERT * dtype.itemsize // 4
    model = AutoModelForCausalLM.from_pretrained(saved, expert_budget=budget, **options)
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    assert isinstance(model.model.layers[2].mlp.experts, PlacedExperts)
    for options in ({"input_ids": TOKENS, "attention_mask": mask}, {"input_ids": TOKENS[:1, :1]}):
        assert torch.equal(model(**options).logits, apart(**options).logits)
    assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)
    off = (model(TOKENS[:1, :1]).logits - whole(TOKENS[:1, :1]).logits).norm() / whole(TOKENS[:1, :1]).logits.norm()
    assert off < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("experts", [2, 15])
@torch.no_grad()
def test_other_implementations_compute_the_same(saved, implementation, experts):
    whole = HubMoeForCausalLM.from_pretrained(saved, experts_implementation=implementation)
    model = HubMoeForCausalLM.from_pretrained(
        saved, expert_budget=experts * EXPERT, experts_implementation=implementation
    )
    torch.testing.assert_close(model(TOKENS).logits, whole(TOKENS).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_generation_gives_the_same_tokens_and_reads_only_what_is_not_there(saved):
    whole = HubMoeForCausalLM.from_pretrained(saved)
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=8 * EXPERT)
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), whole.generate(TOKENS, **options))
    before = count_reads(model)
    for _ in range(3):
        model(TOKENS[:1, :1])
    uses, reads = (after - first for after, first in zip(count_reads(model), before, strict=True))
    assert uses == 3 * 2 * 2  # steps, layers, experts of a token
    assert reads <= 2 * 2


@torch.no_grad()
def test_mtp_layers_draft_from_files_too(tiny_config, tmp_path):
    tiny_config.num_mtp_layers = 1
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "use_mtp": True}
    expected = HubMoeForCausalLM.from_pretrained(tmp_path).generate(TOKENS[:1], **options)
    model = HubMoeForCausalLM.from_pretrained(tmp_path, expert_budget=6 * EXPERT)
    assert isinstance(model.model.layers[3].mlp.experts, PlacedExperts)
    assert torch.equal(model.generate(TOKENS[:1], **options), expected)


@torch.no_grad()
def test_the_hottest_experts_of_the_profile_are_read_once(saved, tmp_path):
    whole = HubMoeForCausalLM.from_pretrained(saved)
    profile = _profile(whole)
    profile.save(tmp_path / "profile.json")
    by_path = {"expert_budget": 12 * EXPERT, "expert_profile": tmp_path / "profile.json"}
    model = HubMoeForCausalLM.from_pretrained(saved, **by_path)
    assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)
    layers = profile.domain().layers
    hottest = {
        (index, expert)
        for index, layer in layers.items()
        for expert in sorted(range(8), key=lambda expert, layer=layer: -layer.tokens[expert])[:4]
    }  # of 6 slots in a layer, 2 are for the others
    caches = [layer.mlp.experts.cache for layer in model.model.layers[1:]]
    assert set().union(*(cache._pinned for cache in caches)) == hottest
    assert all((key in cache._slots) for cache in caches for key in cache._pinned)


def test_a_profile_of_another_model_is_refused(saved, tiny_config, tmp_path):
    tiny_config.n_routed_experts = 4
    other = _profile(HubMoeForCausalLM(tiny_config))
    with pytest.raises(ConfigError, match="layer 1 has 8 experts, and in the profile 4"):
        HubMoeForCausalLM.from_pretrained(saved, expert_budget=8 * EXPERT, expert_profile=other)
    with pytest.raises(ConfigError, match="give an expert_budget too"):
        HubMoeForCausalLM.from_pretrained(saved, expert_profile=other)


@torch.no_grad()
def test_routing_is_recorded_as_of_a_model_in_memory(saved):
    whole = HubMoeForCausalLM.from_pretrained(saved)
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=6 * EXPERT)
    assert _profile(model) == _profile(whole)
    assert [layer.num_experts for layer in find_moe_layers(model)] == [8, 8]
    assert model.num_parameters() == whole.num_parameters()


def test_a_budget_that_holds_everything_gives_an_ordinary_model_and_says_so(saved, caplog):
    with caplog.at_level(logging.WARNING):
        model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=16 * EXPERT)
    assert "All routed experts (0.09 MiB) fit in the expert_budget" in caplog.text
    assert not any(isinstance(module, PlacedExperts) for module in model.modules())
    model.train()
    assert model(TOKENS, labels=TOKENS).loss.requires_grad


@pytest.mark.parametrize("budget", [1, 2 * EXPERT - 1])
def test_a_budget_below_the_experts_of_one_token_is_refused(saved, budget):
    with pytest.raises(ConfigError, match=rf"a token needs 2 experts of 6,144 bytes .*give at least {2 * EXPERT:,}"):
        HubMoeForCausalLM.from_pretrained(saved, expert_budget=budget)


def test_training_is_refused_in_one_sentence_and_changes_nothing(saved):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=8 * EXPERT)
    with pytest.raises(ConfigError, match=r"^A model with an expert_budget is for inference only; [^.]*\.$"):
        model.train()
    assert not any(module.training for module in model.modules())
    assert model.eval() is model
    assert not model(TOKENS, labels=TOKENS).loss.requires_grad
    embeds = model.get_input_embeddings()(TOKENS).requires_grad_()
    with pytest.raises(ConfigError, match="inference only"):
        model(inputs_embeds=embeds)


def test_saving_and_loading_weights_is_refused_in_one_sentence(saved, tiny_model, tmp_path):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=8 * EXPERT)
    for refused in (
        lambda: model.save_pretrained(tmp_path / "copy"),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(tiny_model.state_dict()),
    ):
        with pytest.raises(CheckpointError, match=r"^The experts of a model with an expert_budget stay in their files"):
            refused()
    assert not (tmp_path / "copy").exists()


@torch.no_grad()
def test_the_model_may_be_told_to_go_where_it_is(saved):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=8 * EXPERT)
    expected = model(TOKENS).logits
    assert torch.equal(model.to("cpu")(TOKENS).logits, expected)
    with pytest.raises(ConfigError, match="moved to meta, and its experts were loaded for cpu"):
        model.to("meta")(TOKENS.to("meta"))


@torch.no_grad()
def test_files_that_are_removed_or_replaced_go_on_being_read(saved, tiny_model):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT)
    for file in saved.glob("*.safetensors"):
        file.with_suffix(".new").write_bytes(b"something else")
        file.with_suffix(".new").replace(file)
    assert torch.equal(model(TOKENS).logits, tiny_model(TOKENS).logits)


@pytest.mark.parametrize("change", ["overwritten", "shortened"])
@torch.no_grad()
def test_files_that_are_changed_are_an_error_until_the_model_is_loaded_again(saved, change, tiny_model):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT)
    for file in saved.glob("*.safetensors"):
        with open(file, "r+b") as opened:
            data = opened.read()
            opened.truncate(len(data) // 2) if change == "shortened" else None
            opened.seek(0)
            opened.write(data[: len(data) // 2])
        os.utime(file, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model-.*safetensors was changed while the model was in use; load"):
            model(TOKENS)
    if change == "overwritten":  # by the same bytes
        again = HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT)
        assert torch.equal(again(TOKENS).logits, tiny_model(TOKENS).logits)


@torch.no_grad()
def test_an_error_while_reading_leaves_the_cache_sound(saved, tiny_model):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT)
    times = {file: os.stat(file).st_mtime_ns for file in saved.glob("*.safetensors")}
    for file in times:
        os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed"):
        model(TOKENS)
    for file, time in times.items():
        os.utime(file, ns=(time, time))
    assert torch.equal(model(TOKENS).logits, tiny_model(TOKENS).logits)


@torch.no_grad()
def test_several_threads_may_use_the_model_at_once(saved, tiny_model):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=5 * EXPERT)
    batches = [TOKENS.roll(shift, 1)[:, : shift + 1] for shift in range(12)]
    run = torch.no_grad()(lambda tokens: model(tokens, use_cache=False).logits)  # each thread has its own grad mode
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches))
    expected = [with_experts_apart(tiny_model)(tokens, use_cache=False).logits for tokens in batches]
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_fused_checkpoints_and_other_heads_may_stay_in_files_too(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "fused" / "model.safetensors"))
    model = HubMoeForCausalLM.from_pretrained(tmp_path / "fused", expert_budget=5 * EXPERT)
    assert torch.equal(model(TOKENS).logits, tiny_model(TOKENS).logits)
    classifier, info = HubMoeForSequenceClassification.from_pretrained(
        tmp_path / "fused", expert_budget=5 * EXPERT, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(classifier.model(TOKENS)[0], tiny_model.model(TOKENS)[0])


def test_what_cannot_stay_in_files_is_refused(tiny_model, saved, tmp_path):
    with pytest.raises(ConfigError, match="does not go together with a device_map that puts modules on the disk"):
        HubMoeForCausalLM.from_pretrained(
            saved, expert_budget="20KiB", device_map={"": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "off"
        )
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    tiny_model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not go together with weights that are not in safetensors files"):
        HubMoeForCausalLM.from_pretrained(tmp_path, expert_budget="20KiB", use_safetensors=False)


def test_a_model_without_experts_is_refused(tiny_config, tmp_path):
    tiny_config.first_k_dense_replace = tiny_config.num_hidden_layers
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError):
        HubMoeForCausalLM.from_pretrained(tmp_path, expert_budget="20KiB")


# the limit is on all private memory, above what the imports took; files that are mapped or cached do not count
CHILD = """
import resource, sys
import torch
from hub_moe.modeling import HubMoeForCausalLM
folder, half, options = sys.argv[1], int(sys.argv[2]), {"expert_budget": sys.argv[3]} if len(sys.argv) > 3 else {}
tokens = torch.arange(40)[None]
torch.nn.functional.linear(torch.ones(40, 256), torch.ones(256, 256))  # starts threads and their memory
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + half, used + half))
try:
    model = HubMoeForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
        print(model.generate(tokens, **options).tolist())
except (MemoryError, RuntimeError, OSError) as error:
    print("no memory:", type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux only")
def test_a_model_twice_as_large_as_the_memory_limit_runs(tmp_path):
    torch.manual_seed(0)
    whole = HubMoeForCausalLM(HubMoeConfig(**MANY_EXPERTS)).eval()
    whole.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 380 * 2**20
    tokens = torch.arange(40)[None]
    expected = whole.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)

    def run(*budget):
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(size // 2), *budget]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert run("110MiB") == str(expected.tolist())
    assert run().startswith("no memory")


@torch.no_grad()
def test_load_takes_a_budget_too(saved, tiny_model):
    model = hub_moe.load(saved, expert_budget=6 * EXPERT)
    assert torch.equal(model(TOKENS).logits, tiny_model(TOKENS).logits)


def test_a_model_with_a_budget_is_not_copied_and_says_so(saved):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT)
    for copies in (copy.deepcopy, pickle.dumps):
        with pytest.raises(CheckpointError, match="stay in their files; load it without one to copy or pickle it"):
            copies(model)


def test_an_expert_profile_that_is_not_there_is_told(saved):
    with pytest.raises(ConfigError, match=r"There is no expert profile nowhere\.json\."):
        HubMoeForCausalLM.from_pretrained(saved, expert_budget=4 * EXPERT, expert_profile="nowhere.json")
