"""A tiny seeded model and tokenizer that every test may ask for, and the `gpu`, `network` markers.

torch and transformers are imported inside the fixtures, so that the structural tests stay fast.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

# workers share the cores, and torch's threads slow each other down a lot where there are more of them than cores
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU, kernels run in Triton's interpreter. It is read when triton is imported, as transformers does early.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

SENTENCES = [
    "A router scores every token against every expert and picks a few of them.",
    "The balancing bias steers the choice of experts and never their weight.",
    "def route(token, experts):\n    return sorted(experts, key=token.score)[:2]\n",
]


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the committed texts in tests/golden instead of comparing with them",
    )


def pytest_collection_modifyitems(config, items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        _skip(gpu_items, "needs a CUDA device")
    if "network" not in config.option.markexpr:
        network_items = [item for item in items if item.get_closest_marker("network")]
        _skip(network_items, "needs the public Hub; run with -m network")


def _has_gpu():
    import torch

    return torch.cuda.is_available()


def _skip(items, reason):
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    """Every test that uses torch starts from the same seed; the others do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_data():
    """The folder of released data that is not part of the project; tests that want it skip where there is none."""
    import hub_moe

    beside_the_project = Path(hub_moe.__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HUB_MOE_SHARED_DATA", beside_the_project))
    if not folder.is_dir():
        pytest.skip("needs the folder of released data; HUB_MOE_SHARED_DATA says where it is")
    return folder


@pytest.fixture
def tiny_config():
    """A HubMoeConfig with one dense and two expert layers, 8 experts in 2 groups, 2 per token."""
    from hub_moe.modeling import HubMoeConfig

    return HubMoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


@pytest.fixture
def tiny_model(tiny_config):
    """A HubMoeForCausalLM of `tiny_config`: the same random float32 weights always, eval mode."""
    import torch

    from hub_moe.modeling import HubMoeForCausalLM

    torch.manual_seed(0)
    return HubMoeForCausalLM(tiny_config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer for `tiny_config`: 128 tokens, lossless on printable ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    byte_letters_of_space_and_newline = ["Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + byte_letters_of_space_and_newline,
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")
