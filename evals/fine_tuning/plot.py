"""The picture of the comparison: what each method gains on the task against what it loses on the base's text."""

from typing import Any

from matplotlib.figure import Figure

COLOURS = {"full": "#6b6b6b", "experts": "#2a6fbb", "lora": "#d9662b"}


def plot_trade_off(summary: dict[str, Any]) -> Figure:
    """Every learning rate tried as a small point, each method's best one as a large point with its deviation."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    for method, figures in summary["methods"].items():
        tried = sorted(
            (point["learning_rate"], point["base_text_bits_per_byte"], point["task_loss"])
            for point in summary["rates_tried"]
            if point["method"] == method
        )
        colour = COLOURS[method]
        axes.plot([bits for _, bits, _ in tried], [loss for *_, loss in tried], color=colour, alpha=0.35, marker=".")
        loss, bits = figures["task_loss"], figures["base_text_bits_per_byte"]
        axes.errorbar(
            bits["after"], loss["after"], xerr=bits["after_sd"], yerr=loss["after_sd"], color=colour, marker="o",
            markersize=8, capsize=3, linestyle="none", label=f"{method}, {figures['trained']:,} numbers",
        )  # fmt: skip
    axes.plot(bits["before"], loss["before"], color="black", marker="*", markersize=12, linestyle="none", label="base")
    axes.set_xlabel("bits per byte of the base's own text (further right: more forgotten)")
    axes.set_ylabel("held-out loss on the task (nats per token)")
    axes.set_title(f"Fine-tuning on {summary['task']}: gain and loss\nlines join the learning rates tried")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
