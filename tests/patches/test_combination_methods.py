"""The maths of combining changes, against cases computed by hand and plain implementations number by number."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hub_moe.errors import ConfigError
from hub_moe.patches import CombinationMethod
from hub_moe.patches.combination_methods import (
    combine_changes,
    drop_and_rescale,
    elected_mean,
    mean_change,
    slerp,
    trim,
)

FLOATS = st.floats(-4, 4, width=32, allow_subnormal=False)


def changes_of(count, *, elements=FLOATS):
    """`count` small tensors of one shape, with weights."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))
    tensors = shapes.flatmap(lambda shape: st.tuples(*[arrays(np.float32, shape, elements=elements)] * count))
    weights = st.tuples(*[st.floats(0.25, 4, width=32)] * count)
    return st.tuples(tensors.map(lambda some: [torch.from_numpy(each) for each in some]), weights)


def combine(changes, weights, name, **parameters):
    method = CombinationMethod(name, **parameters)
    return combine_changes(changes, weights, method=method, labels=[f"t {i}" for i in range(len(changes))])


def ties_by_hand(changes, weights, density):
    """TIES as Algorithm 1 of the paper says it, one number after the other in float64."""
    columns = [change.double().flatten().tolist() for change in changes]
    trimmed = []
    for column in columns:
        kept = max(1, math.floor(density * len(column)))
        threshold = sorted((abs(x) for x in column), reverse=True)[kept - 1]
        trimmed.append([x if abs(x) >= threshold else 0.0 for x in column])
    merged = []
    for numbers in zip(*trimmed, strict=True):
        mass = sum(w * x for w, x in zip(weights, numbers, strict=True))
        agreeing = [(w, x) for w, x in zip(weights, numbers, strict=True) if x * mass > 0]
        merged.append(sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(changes[0].shape)


def t(*numbers):
    return torch.tensor(numbers)


def test_the_mean_of_two_by_hand():
    torch.testing.assert_close(mean_change([t(1.0, -2.0), t(3.0, 2.0)], [1, 3]), t(2.5, 1.0))


def test_trimming_keeps_the_largest_by_magnitude():
    assert trim(t(0.1, -5.0, 2.0, -0.3), 0.5).tolist() == [0.0, -5.0, 2.0, 0.0]
    assert trim(t(0.1, -5.0, 2.0, -0.3), 0.01).tolist() == [0.0, -5.0, 0.0, 0.0]
    assert trim(t(1.0, -1.0, 1.0, 0.5), 0.25).tolist() == [1.0, -1.0, 1.0, 0.0]  # none of equals is chosen by place


def test_the_elected_mean_by_hand():
    """4 against -1 and -2: plus wins; 1 against -1: nobody; -3 alone; 2, 2, -1 with weights."""
    merged = elected_mean([t(4.0, 1.0, 0.0), t(-1.0, -1.0, 0.0), t(-2.0, 0.0, -3.0)], [1, 1, 1])
    torch.testing.assert_close(merged, t(4.0, 0.0, -3.0))
    torch.testing.assert_close(elected_mean([t(2.0), t(-1.0)], [1, 3]), t(-1.0))


def test_ties_by_hand():
    merged = combine([t(4.0, -0.5, 2.0, 0.1), t(-1.0, 3.0, 2.5, 0.2)], [1, 1], "ties", density=0.5)
    torch.testing.assert_close(merged, t(4.0, 3.0, 2.25, 0.0))


def test_slerp_by_hand():
    half = slerp(t(1.0, 0.0), t(0.0, 1.0), share=0.5)
    torch.testing.assert_close(half, t(math.sqrt(0.5), math.sqrt(0.5)))
    third = slerp(t(2.0, 0.0), t(0.0, 2.0), share=1 / 3)
    torch.testing.assert_close(third, t(2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)))


def test_slerp_is_linear_where_changes_are_nearly_parallel_or_zero():
    torch.testing.assert_close(slerp(t(1.0, 1.0), t(3.0, 3.0), share=0.25), t(1.5, 1.5))
    torch.testing.assert_close(slerp(t(1.0, 1.0), t(-1.0, -1.0), share=0.5), t(0.0, 0.0))
    torch.testing.assert_close(slerp(t(0.0, 0.0), t(2.0, 4.0), share=0.5), t(1.0, 2.0))


def test_dare_drops_about_its_share_and_keeps_the_mean():
    change = torch.full((400, 500), 2.0)
    dropped = drop_and_rescale(change, 0.25, seed="a")
    assert set(dropped.unique().tolist()) == {0.0, 8.0}
    assert float(dropped.mean()) == pytest.approx(2.0, rel=0.02)


def test_dare_is_the_same_for_a_seed_and_another_for_another_seed_or_tensor():
    change = torch.ones(1000)
    assert torch.equal(drop_and_rescale(change, 0.5, seed="a"), drop_and_rescale(change, 0.5, seed="a"))
    assert not torch.equal(drop_and_rescale(change, 0.5, seed="a"), drop_and_rescale(change, 0.5, seed="b"))
    first, second = (combine([change, change], [1, 1], "dare", seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 1.0, 2.0}  # the two patches drop different numbers


def test_dare_ties_is_the_election_among_what_is_left():
    changes = [torch.full((500,), 1.0), torch.full((500,), -3.0)]
    merged = combine(changes, [1, 1], "dare_ties", density=0.5)
    assert set(merged.unique().tolist()) == {-6.0, 0.0, 2.0}


@settings(max_examples=60, deadline=None)
@given(changes_of(3), st.floats(0.05, 1))
def test_ties_is_the_papers_algorithm(case, density):
    changes, weights = case
    assert torch.allclose(
        combine(changes, weights, "ties", density=density).double(), ties_by_hand(changes, weights, density), atol=1e-5
    ) or _has_close_vote(changes, weights, density)


def _has_close_vote(changes, weights, density):
    """Whether float32 may elect another sign than float64, as the votes cancel but for rounding."""
    trimmed = [trim(change, density).double() for change in changes]
    mass = sum(w * change for w, change in zip(weights, trimmed, strict=True)).abs()
    return bool(((mass < 1e-5) & (sum(change.abs() for change in trimmed) > 0)).any())


@settings(max_examples=40, deadline=None)
@given(changes_of(3), st.sampled_from(["mean", "ties"]))
def test_the_order_of_patches_does_not_matter(case, name):
    changes, weights = case
    if name == "ties" and _has_close_vote(changes, weights, 0.2):
        return
    there = combine(changes, weights, name)
    back = combine(changes[::-1], weights[::-1], name)
    torch.testing.assert_close(there, back, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(changes_of(1), st.sampled_from(["mean", "ties", "dare", "dare_ties", "slerp"]))
def test_equal_changes_combine_to_that_change(case, name):
    (change,), _ = case
    full = {"density": 1.0} if name not in ("mean", "slerp") else {}
    torch.testing.assert_close(combine([change, change], [1, 3], name, **full), change, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(changes_of(3, elements=st.floats(0.125, 4, width=32)))
def test_ties_of_all_numbers_with_agreeing_signs_is_the_mean(case):
    changes, weights = case
    mean = combine(changes, weights, "mean")
    torch.testing.assert_close(combine(changes, weights, "ties", density=1.0), mean, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(changes_of(3))
def test_dare_that_drops_nothing_is_the_mean(case):
    changes, weights = case
    assert torch.equal(combine(changes, weights, "dare", density=1.0), combine(changes, weights, "mean"))


@settings(max_examples=40, deadline=None)
@given(changes_of(2), st.floats(0, 1))
def test_slerp_meets_its_ends_and_keeps_to_the_plane(case, share):
    (first, second), _ = case
    torch.testing.assert_close(slerp(first, second, share=0.0), first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(slerp(first, second, share=1.0), second, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        slerp(first, second, share=share), slerp(second, first, share=1 - share), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tie"}, "There is no method 'tie'; expected one of refuse, mean, ties, dare, dare_ties, slerp"),
        ({"name": "ties", "density": 0.0}, "density must be above 0 and at most 1, not 0.0"),
        ({"name": "dare", "density": 1.5}, "density must be above 0 and at most 1, not 1.5"),
        ({"name": "ties", "density": math.nan}, "density must be above 0 and at most 1, not nan"),
        ({"name": "mean", "density": 0.5}, "The method mean has no density"),
        ({"name": "ties", "seed": 1}, "The method ties has no seed"),
        ({"name": "refuse", "weights": (1.0, 1.0)}, "The method refuse has no weights"),
        ({"name": "mean", "weights": (1.0, 0.0)}, "must be a positive number, not 0.0"),
        ({"name": "mean", "weights": (1.0, math.inf)}, "must be a positive number, not inf"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CombinationMethod(**arguments)


def test_slerp_takes_two_patches_and_weights_are_one_for_each():
    with pytest.raises(ConfigError, match="slerp is between two patches, and 3 were given"):
        CombinationMethod("slerp").weights_for(3)
    with pytest.raises(ConfigError, match="2 weights were given for 3 patches"):
        CombinationMethod("mean", weights=(1.0, 2.0)).weights_for(3)
