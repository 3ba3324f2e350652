"""What of the benchmarks on a GPU needs none, with the kernels in Triton's interpreter."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this system")
FOLDER = Path(__file__).parents[2] / "evals" / "speed"
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ARGUMENTS = argparse.Namespace(batch=2, context=70, seed=0)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module, on the CPU."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("gpu", "mla_decode_gpu", "rounds"):
        sys.modules.pop(name, None)


@pytest.fixture
def mla(load, monkeypatch):
    module = load("mla_decode_gpu")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


@without_gpu
@pytest.mark.parametrize(("program", "code"), [("gpu.py", 0), ("mla_decode_gpu.py", 1)])
def test_without_a_gpu_it_says_so_in_one_sentence(program, code):
    done = subprocess.run([sys.executable, FOLDER / program], capture_output=True, text=True)
    assert done.returncode == code
    needs = f"{program} needs a CUDA GPU of compute capability 8.0 or newer; torch finds none."
    assert (done.stdout, done.stderr.strip()) == ("", needs)


def test_all_benchmarks_share_the_minutes_and_how_each_ended_is_told(load, tmp_path, monkeypatch):
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "FOLDER", tmp_path / "evals" / "speed")
    (tmp_path / "evals" / "speed").mkdir(parents=True)
    scripts = {
        "good": "print('{}')",
        "missed": "print('{}'); exit(1)",
        "broken": "exit(1)",
        "slow": "import time; time.sleep(600)",
    }
    scripts["late"] = "print('{}')"
    for name, text in scripts.items():
        (tmp_path / "evals" / "speed" / f"{name}.py").write_text(text, "utf-8")
    ended = gpu.run_all({name: [f"{name}.py"] for name in scripts}, [], minutes=0.1)
    met = {"good": "goals met", "missed": "goals missed", "broken": "failed"}
    assert ended == {**met, "slow": "no time left", "late": "no time left"}


def test_the_whole_run_has_every_shape_of_the_experts(load):
    gpu = load("gpu")
    shapes = [script[2] for script in gpu.PROGRAMS.values() if script[0] == "experts_gpu.py"]
    assert shapes == list(load("experts_gpu").SHAPES)
    assert all((FOLDER / script).is_file() for script, *_ in gpu.PROGRAMS.values())


def test_ours_and_the_stock_class_are_compared_with_float64(mla, monkeypatch):
    layers, cached = mla.make_layers(SHAPE), mla.make_cache(ARGUMENTS, SHAPE)
    assert mla.check(layers, ARGUMENTS, cached).keys() == {"ours_one", "ours_drafts", "stock_one", "stock_drafts"}
    monkeypatch.setattr(mla, "absorb", lambda layer, query, cached, mask: mla.expand(layer, query, cached, mask) * 1.1)
    with pytest.raises(AssertionError, match="attention is off by"):
        mla.check(layers, ARGUMENTS, cached)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start")
def test_the_kernels_are_as_exact_as_the_check_wants(mla, monkeypatch):
    from hub_moe.modeling import absorbed_attention

    monkeypatch.setattr(absorbed_attention, "_suits_gpu_kernels", lambda *_: True)
    monkeypatch.setattr(mla, "LARGEST_ERROR", 2e-2)  # the interpreter cuts a bfloat16 off where a GPU rounds
    with torch.no_grad():
        mla.check(mla.make_layers(SHAPE), ARGUMENTS, mla.make_cache(ARGUMENTS, SHAPE))


def test_every_rival_runs_and_whole_layers_agree(mla):
    layers, cached = mla.make_layers(SHAPE), mla.make_cache(ARGUMENTS, SHAPE)
    with torch.inference_mode():
        torch.manual_seed(0)
        rivals = mla.make_rivals(layers, cached, ARGUMENTS)
        results = {name: run() for name, run in rivals.items()}
    assert results["ours"].shape == (2, 1, 2, 8)
    assert results["drafts"].shape == (2, mla.DRAFTS, 2, 8)
    assert results["copy"].numel() * 2 == cached.numel()
    torch.testing.assert_close(results["mask"], results["ours"], rtol=0.02, atol=0.02)
    seconds = {name: [1.0, 2.0] for name in rivals}
    ratios = mla.ratios_of(seconds | {"stock": [4.0, 8.0]})
    assert ratios["stock"] == {"median": 0.25, "lowest": 0.25, "highest": 0.25}
    assert mla.GOALS.keys() <= ratios.keys()


def test_whole_layers_of_ours_and_the_stock_class_give_the_same(mla):
    layers, cached = mla.make_layers(SHAPE), mla.make_cache(ARGUMENTS, SHAPE)
    outputs = []
    with torch.inference_mode():
        for layer in layers.values():
            torch.manual_seed(0)
            step = mla.make_step(layer, cached, ARGUMENTS)
            outputs.append([step() for _ in range(3)][-1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.03, atol=0.03)
