"""Tensors are read from their files in any order, by threads, and nothing is left behind when a file is damaged."""

import gc
import os
import subprocess
import sys
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_moe.errors import CheckpointError
from hub_moe.modeling import HubMoeForCausalLM, conversion
from hub_moe.modeling.safetensors_files import (
    begin_reading,
    collecting_no_garbage,
    finish,
    read_headers,
    read_in_a_row,
    reading_threads,
)

SIZES = {"a": 5, "b": 0, "c": 3_000_000, "d": 1, "e": 2_500_000, "f": 7}  # float32: some take more than one piece


@pytest.fixture(autouse=True)
def _small_models_are_read_by_threads_too(monkeypatch):
    monkeypatch.setattr(conversion, "PIECE_BYTES", 0)


@pytest.fixture(name="stored")
def _stored(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
    paths = [str(tmp_path / f"{place}.safetensors") for place in range(2)]
    for place, path in enumerate(paths):
        save_file({name: tensors[name] for name in list(SIZES)[place::2]}, path)
    return tensors, read_headers(paths)


@pytest.mark.parametrize("with_threads", [False, True])
def test_tensors_of_several_files_lie_one_behind_the_other(stored, with_threads):
    tensors, places = stored
    names = ["e", "a", "f", "b", "c", "d"]
    target = torch.full((sum(SIZES.values()),), float("nan"))
    with reading_threads() as threads:
        assert read_in_a_row([places[name] for name in names], target, threads if with_threads else None)
    assert torch.equal(target, torch.cat([tensors[name] for name in names]))


def test_each_of_several_targets_is_waited_for_alone(stored):
    tensors, places = stored
    orders = [["f", "c"], ["b"], ["d", "e", "a"]]
    targets = [torch.full((sum(SIZES[name] for name in names),), float("nan")) for names in orders]
    with reading_threads() as threads:
        wanted = [([places[name] for name in names], target) for names, target in zip(orders, targets, strict=True)]
        for reading, names, target in zip(begin_reading(wanted, threads), orders, targets, strict=True):
            finish(reading)
            assert torch.equal(target, torch.cat([tensors[name] for name in names]))


def test_what_has_to_be_converted_is_not_begun(stored):
    target = torch.zeros(5, dtype=torch.bfloat16)
    assert not read_in_a_row([stored[1]["a"]], target, None)
    assert torch.equal(target, torch.zeros(5, dtype=torch.bfloat16))


def test_a_file_that_became_shorter_is_named(stored):
    tensor = stored[1]["e"]
    os.truncate(tensor.path, tensor.offset + 100)
    with reading_threads() as threads:
        [reading] = begin_reading([([tensor], torch.empty(SIZES["e"]))], threads)
        with pytest.raises(CheckpointError, match=r"0\.safetensors ended while it was read"):
            finish(reading)


def test_what_nobody_waits_for_is_not_read(stored):
    places = stored[1]
    with reading_threads() as threads:
        wanted = [([places["c"]], torch.empty(SIZES["c"])) for _ in range(200)]
        reading: list[Future[None]] = [one for each in begin_reading(wanted, threads) for one in each]
    assert all(one.done() for one in reading)
    assert any(one.cancelled() for one in reading)


def test_who_waits_is_told_when_loading_is_given_up(stored):
    places = stored[1]
    with reading_threads() as threads, ThreadPoolExecutor(1) as waiter:
        wanted = [([places["c"]], torch.empty(SIZES["c"])) for _ in range(200)]
        last = waiter.submit(finish, begin_reading(wanted, threads)[-1])
        threads.shutdown(cancel_futures=True)
        with pytest.raises(CancelledError):
            last.result(timeout=60)


def test_a_process_whose_loading_failed_ends(tmp_path, tiny_config):
    tiny_config.update(
        {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": 64, "num_hidden_layers": 8}
    )
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path, max_shard_size=2**24)
    program = f"""if True:
        import os, sys
        import hub_moe.modeling
        from hub_moe.modeling import checkpoint
        shards = sorted(str(path) for path in __import__("pathlib").Path({str(tmp_path)!r}).glob("*.safetensors"))
        read_headers = checkpoint.read_headers
        def read_and_cut(files):
            stored = read_headers(files)
            os.truncate(shards[1], 2**20)
            return stored
        checkpoint.read_headers = read_and_cut
        try:
            hub_moe.modeling.HubMoeForCausalLM.from_pretrained({str(tmp_path)!r})
        except checkpoint.CheckpointError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "ended while it was read" in done.stdout


def test_experts_of_several_dtypes_are_each_converted(tmp_path, tiny_config):
    model = HubMoeForCausalLM(tiny_config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    others = {"1.mlp.experts.5.down_proj": torch.bfloat16, "2.mlp.experts.3.up_proj": torch.float64}
    for name, dtype in others.items():
        tensors[f"model.layers.{name}.weight"] = tensors[f"model.layers.{name}.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = HubMoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        one = model.model.layers[1].mlp.experts.down_proj[5]
        one.copy_(one.bfloat16())
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_modes_of_torch_do_not_reach_the_weights(tmp_path, tiny_config):
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    with torch.inference_mode():
        model = HubMoeForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("is_enabled", [True, False])
def test_loading_leaves_the_collection_of_garbage_as_it_was(tmp_path, tiny_config, is_enabled):
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    (gc.enable if is_enabled else gc.disable)()
    threshold = gc.get_threshold()
    try:
        HubMoeForCausalLM.from_pretrained(tmp_path)
        assert gc.isenabled() == is_enabled
        path = tmp_path / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError):
            HubMoeForCausalLM.from_pretrained(tmp_path)
        assert gc.isenabled() == is_enabled
        assert gc.get_threshold() == threshold
    finally:
        gc.enable()


def test_no_garbage_is_collected_until_the_last_of_several_loads_ends():
    threshold = gc.get_threshold()
    one, other = collecting_no_garbage(), collecting_no_garbage()
    one.__enter__()
    other.__enter__()
    gc.disable()
    one.__exit__(None, None, None)
    assert gc.get_threshold() == (0, *threshold[1:])
    other.__exit__(None, None, None)
    assert gc.get_threshold() == threshold
    assert not gc.isenabled()
    gc.enable()
