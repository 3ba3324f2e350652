"""Models whose routed experts are kept in 8 or 4 bits: what is computed, how far it is off, what it takes, refusals."""

import copy
import gc
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

import hub_moe
from hub_moe.anatomy import find_moe_layers
from hub_moe.errors import CheckpointError, ConfigError, MissingExtraError, PatchError, UnsupportedModelError
from hub_moe.experts.offload import PlacedExperts
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
from hub_moe.patches.expert_patch import find_touched
from tests.anatomy.families import FAMILIES, tiny_config
from tests.experts.apart import with_experts_apart
from tests.experts.sizes import MANY_EXPERTS

primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed")

TOKENS = torch.arange(34).view(2, 17) * 7 % 128
DTYPES = ("int8", "int4")
GROUPS = (128, 64, 32, 16, 8)
MOST_LOGIT_ERROR = {"int8": 0.01, "int4": 0.15}  # of the norm
MOST_OF_BFLOAT16 = {"int8": 0.51, "int4": 0.29}


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def _round(matrix, dtype):
    """By torchao alone: the values that it gives back for a matrix, and the step of each."""
    if dtype == "int8":
        block, bounds, target = (1, matrix.shape[1]), {}, torch.int8
        mapping = primitives.MappingType.SYMMETRIC
    else:
        group = next(size for size in GROUPS if matrix.shape[1] % (2 * size) == 0)
        block, bounds, target = (1, group), {"quant_min": 0, "quant_max": 15}, torch.uint8
        mapping = primitives.MappingType.ASYMMETRIC
    step, zero = primitives.choose_qparams_affine(matrix, mapping, block, target, **bounds, eps=1e-12)
    whole = primitives.quantize_affine(matrix, block, step, zero, target, **bounds)
    values = primitives.dequantize_affine(whole, block, step, zero, target, **bounds)
    return values, step.view(matrix.shape[0], -1).repeat_interleave(block[1], dim=1)


@torch.no_grad()
def _round_experts(model, dtype, exact):
    """`model` with the experts of the float32 model `exact`, rounded."""
    for layer, source in zip(find_moe_layers(model), find_moe_layers(exact), strict=True):
        for name, parameter in layer.experts.named_parameters(recurse=False):
            if parameter.dim() == 3:
                for target, matrix in zip(parameter, getattr(source.experts, name), strict=True):
                    target.copy_(_round(matrix, dtype)[0])
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_every_family_computes_as_with_rounded_weights(family, dtype, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path, max_shard_size="60KB")
    options = {"experts_implementation": "grouped_mm"}
    expected = hub_moe.load(tmp_path, **options)
    _round_experts(expected, dtype, expected)
    model = hub_moe.load(tmp_path, expert_dtype=dtype, **options)
    assert type(model) is type(expected)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_logits_are_bit_equal_to_those_of_rounded_weights(saved, tiny_model, dtype, compute):
    expected = _round_experts(HubMoeForCausalLM.from_pretrained(saved, dtype=compute), dtype, tiny_model)
    with_experts_apart(expected)
    model = AutoModelForCausalLM.from_pretrained(saved, expert_dtype=dtype, dtype=compute)
    assert isinstance(model.model.layers[2].mlp.experts, PlacedExperts)
    for tokens in (TOKENS, TOKENS[:1, :1], TOKENS[:, :3]):
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_weights_are_off_by_half_a_step_and_logits_by_a_bound(saved, tiny_model, dtype):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_dtype=dtype)
    for layer, whole in zip(model.model.layers[1:], tiny_model.model.layers[1:], strict=True):
        kept = layer.mlp.experts.cache._reader.experts[layer.mlp.experts._index]
        for name, stack in kept.items():
            for expert, matrix in enumerate(getattr(whole.mlp.experts, name)):
                values = torch.empty_like(matrix)
                stack.fill_expert(expert, values)
                rounded, step = _round(matrix, dtype)
                assert torch.equal(values, rounded)
                assert ((values - matrix).abs() <= step * 0.501).all()
    expected = tiny_model(TOKENS).logits
    error = (model(TOKENS).logits - expected).norm() / expected.norm()
    assert 0 < error < MOST_LOGIT_ERROR[dtype]


def test_rows_of_zeros_and_of_one_sign_are_kept(tmp_path, tiny_config):
    model = HubMoeForCausalLM(tiny_config).eval()
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        experts.down_proj[0].zero_()
        experts.down_proj[1].abs_()
        experts.gate_up_proj[2, 0] = 3.0
    model.save_pretrained(tmp_path)
    for dtype in DTYPES:
        kept = HubMoeForCausalLM.from_pretrained(tmp_path, expert_dtype=dtype).model.layers[1].mlp.experts
        stacks = kept.cache._reader.experts[1]
        zeros, ones_sign, row = torch.empty(32, 16), torch.empty(32, 16), torch.empty(32, 32)
        stacks["down_proj"].fill_expert(0, zeros)
        stacks["down_proj"].fill_expert(1, ones_sign)
        stacks["gate_up_proj"].fill_expert(2, row)
        assert not zeros.any()
        assert (ones_sign >= 0).all()
        torch.testing.assert_close(row[0], torch.full((32,), 3.0), rtol=0.01, atol=0)


# the limit is on all private memory, above what the imports took; what loads is read, not mapped
CHILD = """
import resource, sys
import torch
from hub_moe.modeling import HubMoeForCausalLM
import torchao.quantization.quant_primitives
folder, size, options = sys.argv[1], int(sys.argv[2]), {"expert_dtype": sys.argv[3]} if sys.argv[3:] else {}
torch.nn.functional.linear(torch.ones(40, 256), torch.ones(256, 256))  # starts threads and their memory
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + size, used + size))
try:
    model = HubMoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        print("finite:", bool(model(torch.arange(40)[None]).logits.isfinite().all()))
except (MemoryError, RuntimeError, OSError) as error:
    print("no memory:", type(error).__name__)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("large")
    HubMoeForCausalLM(HubMoeConfig(**MANY_EXPERTS)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_take_a_half_or_a_quarter_of_bfloat16(large, dtype):
    gc.collect()
    before = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}
    model = HubMoeForCausalLM.from_pretrained(large, dtype=torch.bfloat16, expert_dtype=dtype)
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and id(each) not in before]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors if not each.is_meta
    }
    others = sum(each.nbytes for each in model.parameters() if not each.is_meta)
    slots = sum(stack.nbytes for stack in model.model.layers[0].mlp.experts.cache.stacks.values())
    assert slots == 8 * 3 * 256 * 256 * 2
    whole = 8 * 64 * 3 * 256 * 256 * 2
    assert whole * 0.24 < sum(storages.values()) - others - slots < whole * MOST_OF_BFLOAT16[dtype]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux only")
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.75), ("int4", 0.55)])
def test_loading_never_holds_the_whole_float_model(large, dtype, share):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))

    def run(*options):
        command = [sys.executable, "-c", CHILD, str(large), str(int(size * share)), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert run(dtype) == "finite: True"
    assert run().startswith("no memory")


@torch.no_grad()
def test_generation_and_several_threads_at_once(saved):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_dtype="int8")
    options = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, **options))
    batches = [TOKENS.roll(shift, 1)[:, : shift + 1] for shift in range(12)]
    run = torch.no_grad()(lambda tokens: model(tokens, use_cache=False).logits)  # each thread has its own grad mode
    expected = list(map(run, batches))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches))
    assert all(map(torch.equal, found, expected))


def test_what_needs_plain_weights_is_refused_in_one_sentence(saved, tiny_model, tmp_path):
    model = HubMoeForCausalLM.from_pretrained(saved, expert_dtype="int4")
    with pytest.raises(ConfigError, match=r"^A model with an expert_dtype is for inference only; [^.]*\.$"):
        model.train()
    embeds = model.get_input_embeddings()(TOKENS).requires_grad_()
    with pytest.raises(ConfigError, match="inference only"):
        model(inputs_embeds=embeds)
    for refused in (
        lambda: model.save_pretrained(tmp_path / "copy"),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(tiny_model.state_dict()),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
    ):
        with pytest.raises(
            CheckpointError, match=r"^The experts of a model with an expert_dtype are quantised; [^.]*\.$"
        ):
            refused()
    assert not (tmp_path / "copy").exists()
    with pytest.raises(PatchError):
        find_touched(model, find_moe_layers(model), ["model.layers.1.mlp.experts.0.up_proj.weight"])


def test_arguments_that_do_not_go_together_are_refused(saved, tiny_config, tmp_path):
    for wrong in ("int3", "", 8, torch.int8):
        with pytest.raises(ConfigError, match=r"^expert_dtype is .*; 'int8' or 'int4' was expected\.$"):
            HubMoeForCausalLM.from_pretrained(saved, expert_dtype=wrong)
    for option in ({"expert_budget": "20KiB"}, {"expert_profile": "profile.json"}):
        with pytest.raises(ConfigError, match="expert_dtype keeps all experts in memory"):
            hub_moe.load(saved, expert_dtype="int8", **option)
    tiny_config.moe_intermediate_size = 12
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path / "odd")
    with pytest.raises(
        UnsupportedModelError, match="rows are multiples of 16 numbers, and these experts have rows of 12"
    ):
        HubMoeForCausalLM.from_pretrained(tmp_path / "odd", expert_dtype="int4")
    HubMoeForCausalLM.from_pretrained(tmp_path / "odd", expert_dtype="int8")


def test_without_torchao_it_says_how_to_get_it(saved):
    code = (
        "import sys\nsys.modules['torchao'] = None\n"
        "import hub_moe\nfrom hub_moe.errors import MissingExtraError\n"
        "try:\n    hub_moe.load(sys.argv[1], expert_dtype='int8')\nexcept MissingExtraError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(saved)], check=True, capture_output=True, text=True)
    assert run.stdout == "expert_dtype needs torchao: pip install 'hub_moe[quantized]'.\n"
    assert issubclass(MissingExtraError, ImportError)


def test_commands_say_nothing_of_what_torchao_cannot_load():
    done = subprocess.run(
        [sys.executable, "-m", "hub_moe", "env", "--json"], capture_output=True, text=True, check=True
    )
    assert "torchao" not in done.stderr
    assert "pytree" not in done.stderr
