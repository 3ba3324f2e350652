"""The order in which rows are trained on."""

import pytest

from hub_moe.training.trainer import RowOrder


@pytest.mark.parametrize(("num_rows", "num_draws"), [(1, 5), (7, 3), (7, 7), (7, 40)])
def test_every_row_comes_once_before_any_comes_again(num_rows, num_draws):
    order = list(RowOrder(num_rows, num_draws=num_draws, seed=3))
    assert len(order) == num_draws == len(RowOrder(num_rows, num_draws=num_draws, seed=3))
    for start in range(0, num_draws, num_rows):
        epoch = order[start : start + num_rows]
        assert len(set(epoch)) == len(epoch)


def test_the_order_depends_on_the_seed_alone_and_a_longer_one_begins_like_a_shorter():
    longer = list(RowOrder(10, num_draws=35, seed=1))
    assert list(RowOrder(10, num_draws=20, seed=1)) == longer[:20]
    assert longer[:10] != longer[10:20]
    assert list(RowOrder(10, num_draws=35, seed=2)) != longer
