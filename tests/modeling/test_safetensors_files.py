"""Tensors are read from their files in any order, by threads, and nothing is left behind when a file is damaged."""

import gc
import os
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import save_file

from hub_moe.errors import CheckpointError
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.modeling.safetensors_files import begin_reading, finish, read_headers, read_in_a_row, reading_threads

SIZES = {"a": 5, "b": 0, "c": 3_000_000, "d": 1, "e": 2_500_000, "f": 7}  # float32: some take more than one piece


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


@pytest.mark.parametrize("is_enabled", [True, False])
def test_loading_leaves_the_collection_of_garbage_as_it_was(tmp_path, tiny_config, is_enabled):
    HubMoeForCausalLM(tiny_config).save_pretrained(tmp_path)
    (gc.enable if is_enabled else gc.disable)()
    try:
        HubMoeForCausalLM.from_pretrained(tmp_path)
        assert gc.isenabled() == is_enabled
        path = tmp_path / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError):
            HubMoeForCausalLM.from_pretrained(tmp_path)
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
