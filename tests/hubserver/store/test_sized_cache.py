"""What is remembered has a bound by size, not by number."""

from hub_moe.hubserver.cards import weigh
from hub_moe.hubserver.store.sized_cache import SizedCache


def test_what_was_not_used_for_the_longest_time_makes_room():
    cache = SizedCache(10)
    cache.put("a", 1, size=4)
    cache.put("b", 2, size=4)
    assert cache.get("a") == 1
    cache.put("c", 3, size=4)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_what_is_too_large_alone_is_not_kept_and_drives_nothing_out():
    cache = SizedCache(10)
    cache.put("a", 1, size=10)
    cache.put("b", 2, size=11)
    assert [cache.get(key) for key in "ab"] == [1, None]


def test_a_value_put_again_counts_once():
    cache = SizedCache(10)
    for number in range(5):
        cache.put("a", number, size=6)
    cache.put("b", 9, size=4)
    assert [cache.get(key) for key in "ab"] == [4, 9]


def test_deep_and_wide_values_have_a_weight():
    value = []
    for _ in range(5000):
        value = [value]
    assert weigh(value) > 5000
    assert weigh({"a": ["x" * 1000] * 10}) > 10_000
