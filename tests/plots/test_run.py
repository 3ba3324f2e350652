import pytest

from hub_moe.plots import plot_run


def _row(step, **values):
    return {"step": step, "tokens": 1000 * step, "learning_rate": 0.1 / step, "loss": 5 / step} | values


def _lines(axes):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_loss_imbalance_and_learning_rate_stand_over_tokens():
    rows = [_row(step, imbalance={"1": 2.0, "3": 1 + step}) for step in (1, 2, 3)]
    figure = plot_run(rows, title="A run")
    loss, imbalance, rate = figure.axes

    assert [x for x, _ in _lines(loss)["training (moving average)"]] == [1.0, 2.0, 3.0]
    assert _lines(imbalance)["layer 3"] == [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert [y for _, y in rate.get_lines()[0].get_xydata()] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert rate.get_xlabel() == "tokens seen (thousands)"


def test_held_out_losses_stand_where_they_were_taken():
    rows = [_row(1), {"step": 2, "eval_loss": 4.0}, _row(3, eval_loss=3.0)]
    [loss, *_] = plot_run(rows, title="A run").axes

    assert _lines(loss)["held out"] == [(1.0, 4.0), (3.0, 3.0)]


def test_many_layers_name_only_the_first_and_the_last():
    rows = [_row(1, imbalance={str(layer): 1.5 for layer in range(1, 27)})]
    _, imbalance, _ = plot_run(rows, title="A run").axes

    assert [text.get_text() for text in imbalance.get_legend().get_texts()] == ["layer 1", "layer 26"]


def test_a_loss_that_was_no_number_leaves_a_gap_and_no_rows_an_empty_picture(tmp_path):
    plot_run([_row(1), _row(2, loss=None), _row(3)], title="A run").savefig(tmp_path / "run.png")
    plot_run([], title="A run").savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0
