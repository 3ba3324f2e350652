"""The slots of experts that stay in their files: who leaves, what is read, through what, and what comes of errors."""

import gc
import os
import threading

import pytest
import torch

from hub_moe.errors import CheckpointError
from hub_moe.experts.expert_cache import ExpertCache, ExpertReader
from hub_moe.experts.offload import PlacedExperts
from hub_moe.modeling import HubMoeForCausalLM
from hub_moe.modeling.conversion import Part, StoredStack
from hub_moe.modeling.safetensors_files import read_headers

from .apart import with_experts_apart

EXPERT = 3 * 16 * 32 * 4  # bytes of one of the 16 experts of the tiny model in float32


@pytest.fixture
def stack(tmp_path):
    """Eight experts of 6 x 4 numbers in a file, and the same in memory."""
    from safetensors.torch import save_file

    values = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0))
    save_file({f"e{index}": value.clone() for index, value in enumerate(values)}, tmp_path / "e.safetensors")
    stored = read_headers([str(tmp_path / "e.safetensors")])
    return StoredStack([[Part(stored[f"e{index}"])] for index in range(8)]), values, tmp_path / "e.safetensors"


def _cache(stack, num_slots, *, is_staged=False):
    reader = ExpertReader({0: {"w": stack}}, is_staged=is_staged)
    shapes = {"w": ((6, 4), torch.float32)}
    return ExpertCache(shapes, num_slots, reader, device=torch.device("cpu"), num_layers=1)


def _there(cache):
    return {expert for expert in range(8) if not cache.missing(0, [expert])}


@pytest.mark.parametrize("is_staged", [False, True])
def test_slots_hold_what_the_file_holds(stack, is_staged):
    """Staged is how it goes beside a GPU: through a buffer for each thread."""
    files, values, _ = stack
    cache = _cache(files, 5, is_staged=is_staged)
    for experts in ([0, 1, 2, 3, 4], [4, 5, 6, 7], [0, 7], [3]):
        held = cache.hold(0, experts)
        assert torch.equal(cache.stacks["w"][held], values[experts])
    assert (cache.num_uses, cache.num_reads) == (12, 10)


def test_the_expert_used_least_of_late_leaves(stack):
    cache = _cache(stack[0], 3)
    for experts in ([0, 1], [0, 1], [0, 2]):
        cache.count(0, dict.fromkeys(experts, 1.0))
        cache.hold(0, experts)
    cache.hold(0, [3])
    assert _there(cache) == {0, 1, 3}
    for _ in range(60):  # what was used much goes too, once it is no longer
        cache.count(0, {2: 1.0, 3: 1.0})
        cache.hold(0, [2, 3])
    cache.count(0, {4: 1.0, 5: 1.0})
    cache.hold(0, [4, 5])
    assert 0 not in _there(cache)


def test_counts_do_not_overflow(stack):
    cache = _cache(stack[0], 3)
    for _ in range(6000):
        cache.count(0, {0: 1.0, 1: 0.5})
    assert 0.4 < cache._heat[0, 1] / cache._heat[0, 0] < 0.6
    assert cache._weight < 1e101


def test_turns_hold_every_expert_once_and_leave_those_used_most(stack):
    cache = _cache(stack[0], 4)
    cache.hold(0, [6, 7])
    shares = {expert: expert / 8 for expert in range(8)}
    cache.count(0, shares)
    turns = cache.turns(0, list(range(8)), splits=False)
    assert turns[0] == [6, 7]
    assert sorted(expert for turn in turns for expert in turn) == list(range(8))
    for turn in turns:
        cache.hold(0, turn)
    assert _there(cache) == {4, 5, 6, 7}
    assert cache.turns(0, [2, 7, 5], splits=False) == [[2, 7, 5]]
    assert cache.turns(0, [2, 7, 5], splits=True) == [[5, 7], [2]]
    assert cache.turns(0, [2, 3], splits=True) == [[2, 3]]
    assert cache.turns(0, [], splits=True) == []


def test_an_announced_expert_is_read_all_the_same(stack):
    files, values, path = stack
    cache = _cache(files, 2)
    cache.announce(0, range(8))
    assert _there(cache) == set()
    path.unlink()
    cache.announce(0, [1])
    assert torch.equal(cache.stacks["w"][cache.hold(0, [1, 6])], values[[1, 6]])


@pytest.mark.parametrize("experts", [[3], [3, 4], [1, 3, 4]])
def test_an_error_in_a_reading_thread_comes_up_and_leaves_the_slots_sound(stack, experts):
    files, values, path = stack
    cache = _cache(files, 3)
    cache.hold(0, [0, 1])
    time = os.stat(path).st_mtime_ns
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed while the model was in use"):
        cache.hold(0, experts)
    os.utime(path, ns=(time, time))
    assert torch.equal(cache.stacks["w"][cache.hold(0, experts)], values[experts])
    assert torch.equal(cache.stacks["w"][cache.hold(0, [0, 1, 2])], values[:3])


def _readers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")}


def _open_files(folder):
    return [entry for entry in os.scandir("/proc/self/fd") if os.path.realpath(entry.path).startswith(str(folder))]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed on Linux")
@torch.no_grad()
def test_threads_and_files_end_with_the_model(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    before = _readers()
    model = HubMoeForCausalLM.from_pretrained(tmp_path, expert_budget=8 * EXPERT)
    model(torch.arange(34).view(2, 17))
    started = _readers() - before
    assert started
    assert _open_files(tmp_path)
    del model
    gc.collect()
    for thread in started:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in started)
    assert not _open_files(tmp_path)


@torch.no_grad()
def test_guesses_are_learnt_and_whether_right_or_wrong_change_no_logits(tiny_model, tmp_path):
    """Both layers get one router and blocks that add next to nothing, so the second chooses as the first does."""
    first, second = tiny_model.model.layers[1:]
    second.mlp.gate.load_state_dict(first.mlp.gate.state_dict())
    second.post_attention_layernorm.load_state_dict(first.post_attention_layernorm.state_dict())
    for weight in (second.self_attn.o_proj.weight, first.mlp.experts.down_proj):
        weight.mul_(1e-3)
    first.mlp.shared_experts.down_proj.weight.mul_(1e-3)
    tiny_model.save_pretrained(tmp_path)
    model = HubMoeForCausalLM.from_pretrained(tmp_path, expert_budget=8 * EXPERT)
    with_experts_apart(tiny_model)
    guess = model.model.layers[2].mlp.experts.guess
    assert isinstance(model.model.layers[1].mlp.experts, PlacedExperts)
    assert model.model.layers[1].mlp.experts._following is guess
    for token in range(128):
        tokens = torch.tensor([[token]])
        assert torch.equal(model(tokens).logits, tiny_model(tokens).logits)
    assert min(guess._chances) > 0.8
    for changed in (tiny_model, model):
        changed.model.layers[2].post_attention_layernorm.weight.neg_()
    for token in range(128):
        tokens = torch.tensor([[token]])
        assert torch.equal(model(tokens).logits, tiny_model(tokens).logits)
    assert max(guess._chances) < 0.3
