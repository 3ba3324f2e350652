"""The kernels over the latent cache against the definition in float64; without a GPU, in Triton's interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this system")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)

from hub_moe.modeling import absorbed_attention, latent_kernels
from hub_moe.modeling.absorbed_attention import LatentCache, attend_to_latents
from hub_moe.modeling.latent_kernels import Blocks, attend_in_splits, choose_split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts a bfloat16 off where a GPU rounds; a GPU makes a float32 of three products of 10 bits each
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# sequences, heads, new tokens, cached, latent, rope: one token, several splits, rows and tokens that no block divides,
# several blocks of rows, one split for all
SIZES = [
    (1, 2, 1, 1, 24, 4),
    (2, 4, 1, 300, 24, 4),
    (3, 4, 5, 213, 16, 8),
    (1, 33, 2, 40, 32, 16),
    (9, 2, 3, 70, 48, 8),
]
KINDS = ("none", "seen", "one per head", "numbers", "a row sees nothing")


def make_inputs(size, dtype):
    """Queries and a cache that is a slice of a longer one, side by side."""
    batch, heads, new, cached, latent, rope = size
    query = torch.randn(batch, heads, new, latent + rope, device=DEVICE).to(dtype)
    both = torch.randn(batch, cached + 3, latent + rope, device=DEVICE).to(dtype)[:, :cached]
    return query.split([latent, rope], dim=-1), LatentCache(*both.split([latent, rope], dim=-1))


def make_mask(kind, size):
    batch, heads, new, cached = size[:4]
    seen = torch.rand(batch, 1, new, cached, device=DEVICE) < 0.7
    seen[..., 0] = True
    if kind == "one per head":
        seen = torch.rand(batch, heads, new, cached, device=DEVICE) < 0.7
        seen[..., 0] = True
    if kind == "a row sees nothing":
        seen[0, :, -1] = False
    if kind == "numbers":
        return torch.randn(seen.shape, device=DEVICE).masked_fill(~seen, float("-inf"))
    return None if kind == "none" else seen


def attend(queries, cache, mask, scaling):
    """The definition, in float64."""
    query, key = (torch.cat(tuple(parts), dim=-1).double() for parts in (queries, cache))
    scores = query @ key.mT.unsqueeze(1) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0) @ cache.latent_BSC.double().unsqueeze(1)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_mask_and_size_gives_the_definitions_means_of_latents(size, kind, dtype):
    (query, turned), cache = make_inputs(size, dtype)
    mask = make_mask(kind, size)
    actual = attend_in_splits(query, turned, cache, mask=mask, scaling=0.3)
    assert (actual.shape, actual.dtype) == (query.shape, dtype)
    assert error(actual, attend((query, turned), cache, mask, 0.3)) <= TOLERANCES[dtype]
    if kind == "a row sees nothing":
        assert (actual[0, :, -1] == 0).all()
    assert torch.equal(attend_in_splits(query, turned, cache, mask=mask, scaling=0.3), actual)


def test_numbers_that_hide_everything_give_the_mean_of_all_tokens_as_in_torch():
    size = (2, 2, 1, 117, 24, 4)
    (query, turned), cache = make_inputs(size, torch.float32)
    mask = torch.zeros(2, 1, 1, 117, device=DEVICE)
    mask[0] = float("-inf")
    actual = attend_in_splits(query, turned, cache, mask=mask, scaling=0.3)
    torch.testing.assert_close(actual[0], cache.latent_BSC[0].mean(0).expand(2, 1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [Blocks(16, 4, 2), Blocks(64, 4, 2)], ids=str)
def test_other_blocks_give_the_same(blocks):
    size = SIZES[2]
    (query, turned), cache = make_inputs(size, torch.float32)
    actual = attend_in_splits(query, turned, cache, mask=None, scaling=0.3, blocks=blocks)
    assert error(actual, attend((query, turned), cache, None, 0.3)) <= TOLERANCES[torch.float32]


def test_what_lies_behind_the_last_token_is_not_read():
    (query, turned), cache = make_inputs(SIZES[2], torch.float32)
    expected = attend_in_splits(query, turned, cache, mask=None, scaling=0.3)
    for part in cache:
        part.as_strided(
            (part.shape[0], 3, part.shape[2]), part.stride(), part[:, -1:].storage_offset() + part.stride(1)
        )[:] = float("nan")
    assert torch.equal(attend_in_splits(query, turned, cache, mask=None, scaling=0.3), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "new", "cached"), [(1, 1, 1), (1, 1, 37), (3, 5, 113)])
def test_attention_by_the_kernels_equals_its_twin_in_torch(kind, batch, new, cached, monkeypatch):
    (nope, turned), cache = make_inputs((batch, 4, new, cached, 24, 8), torch.float32)
    query = torch.cat((nope[..., :12], turned), dim=-1)
    weight = torch.randn(4, 12 + 10, 24, device=DEVICE)
    mask = make_mask(kind, (batch, 4, new, cached))
    results = []
    for is_suited in (False, True):
        monkeypatch.setattr(absorbed_attention, "_suits_gpu_kernels", lambda *_, is_suited=is_suited: is_suited)
        with torch.no_grad():
            results.append(attend_to_latents(query, cache, weight, mask=mask, scaling=0.3)[0])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4 if DEVICE == "cpu" else 2e-3)


def test_gradients_and_sizes_without_room_are_left_to_torch():
    assert latent_kernels.fits(512, 64)
    assert not latent_kernels.fits(1024, 64)
    _, cache = make_inputs(SIZES[0], torch.float32)
    with torch.enable_grad():
        assert not absorbed_attention._suits_gpu_kernels(cache, torch.float32)


@pytest.mark.parametrize("programs", [1, 3, 32, 131, 300, 4000])
@pytest.mark.parametrize("blocks", [1, 7, 512, 4096])
def test_splits_fill_the_gpu_and_cover_every_token_once(programs, blocks):
    slots = 264
    blocks_of_split = choose_split(programs, blocks, slots)
    splits = -(-blocks // blocks_of_split)
    assert 1 <= blocks_of_split <= blocks
    assert (splits - 1) * blocks_of_split < blocks <= splits * blocks_of_split
    waves = -(-programs * splits // slots)
    ideal = programs * blocks / slots
    assert waves * blocks_of_split <= 1.35 * ideal + 4
