"""transformers, datasets and the `hf` command against the Hub, each in a process where HF_ENDPOINT is set first."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PUSH_MODEL = """
import torch, transformers
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
torch.manual_seed(0)
config = HubMoeConfig(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, max_position_embeddings=64)
model = HubMoeForCausalLM(config).eval()
model.push_to_hub("alice/{name}")
loaded = transformers.AutoModelForCausalLM.from_pretrained("alice/{name}").eval()
tokens = torch.arange(8)[None]
assert torch.equal(model(tokens).logits, loaded(tokens).logits)
from huggingface_hub import HfApi
info = HfApi().model_info("alice/{name}")
print(info.safetensors.total, sum(p.numel() for p in model.parameters()))
"""

PUSH_DATASET = """
import datasets
rows = datasets.Dataset.from_dict({{"text": [f"row {{n}}" for n in range(100)], "n": list(range(100))}})
datasets.DatasetDict(train=rows, test=rows.select(range(10))).push_to_hub("alice/{name}", private=True)
loaded = datasets.load_dataset("alice/{name}")
streamed = datasets.load_dataset("alice/{name}", split="test", streaming=True)
print(loaded["train"][7]["text"], len(loaded["test"]), sum(row["n"] for row in streamed))
datasets.Dataset.from_dict({{"text": ["other"]}}).push_to_hub("alice/{name}", "second")
print(datasets.get_dataset_config_names("alice/{name}"))
"""


@pytest.mark.parametrize("xet", [False, True])
def test_a_model_is_pushed_and_loaded_back_by_transformers(hub, xet):
    pytest.importorskip("transformers")
    counted, real = hub.run_python(PUSH_MODEL.format(name=f"tiny-{xet}"), xet=xet).split()
    assert int(counted) >= int(real) > 0


@pytest.mark.parametrize("xet", [False, True])
def test_a_dataset_is_pushed_loaded_and_streamed_by_datasets(hub, xet):
    pytest.importorskip("datasets")
    first, second = hub.run_python(PUSH_DATASET.format(name=f"rows-{xet}"), xet=xet).strip().splitlines()
    assert first == "row 7 10 45"
    assert second == "['default', 'second']"


def _hf(hub, *arguments, xet=True):
    command = shutil.which("hf", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the hf command is not beside this Python")
    done = subprocess.run([command, *arguments], env=hub.environment(xet=xet), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("xet", [False, True])
def test_the_hf_command_creates_uploads_downloads_and_lists(hub, tmp_path, xet):
    name = f"alice/by-command-{xet}"
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "w.bin").write_bytes(bytes(100_000))
    (tmp_path / "up" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "alice" in _hf(hub, "auth", "whoami", xet=xet)
    _hf(hub, "repos", "create", name, xet=xet)
    _hf(hub, "upload", name, str(tmp_path / "up"), ".", xet=xet)
    _hf(hub, "download", name, "--local-dir", str(tmp_path / "down"), xet=xet)
    assert (tmp_path / "down" / "w.bin").read_bytes() == bytes(100_000)
    _hf(hub, "repos", "tag", "create", name, "v1", xet=xet)
    assert "v1" in _hf(hub, "repos", "tag", "list", name, xet=xet)
    listed = json.loads(_hf(hub, "models", "list", "--search", name, "--format", "json", xet=xet))
    assert [model["id"] for model in listed] == [name]
    _hf(hub, "repos", "delete-files", name, "w.bin", xet=xet)
    _hf(hub, "repos", "delete", name, "--yes", xet=xet)
