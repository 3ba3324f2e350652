"""Records of trials to a table: means over seeds, and what each method gained and lost."""

import statistics
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """The learning rate of each method with the lowest held-out loss on the task."""
    best: dict[str, Record] = {}
    for record in records:
        known = best.get(record["method"])
        if known is None or record["task_loss"]["after"] < known["task_loss"]["after"]:
            best[record["method"]] = record
    return {method: record["learning_rate"] for method, record in best.items()}


def summarise(records: Sequence[Record], *, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of each method at its best rate, over seeds; and those of every rate that was tried."""
    seed_0 = [record for record in records if record["seed"] == 0]
    rates = best_rates(seed_0)
    return {
        "task": name,
        "settings": settings,
        "methods": {method: _sum_up(records, method, rate) for method, rate in rates.items()},
        "rates_tried": [
            {
                "method": record["method"],
                "learning_rate": record["learning_rate"],
                "task_loss": record["task_loss"]["after"],
                "base_text_bits_per_byte": record["base_text_bits_per_byte"]["after"],
            }
            for record in seed_0
        ],
        "versions": records[0]["versions"],
    }


def _sum_up(records: Sequence[Record], method: str, rate: float) -> dict[str, Any]:
    chosen = [record for record in records if (record["method"], record["learning_rate"]) == (method, rate)]
    return {
        "learning_rate": rate,
        "rank": chosen[0]["rank"],
        "trained": chosen[0]["trained"],
        "seeds": len(chosen),
        "task_loss": _before_and_after(chosen, "task_loss"),
        "base_text_bits_per_byte": _before_and_after(chosen, "base_text_bits_per_byte"),
    }


def _before_and_after(records: Sequence[Record], key: str) -> dict[str, float]:
    after = [record[key]["after"] for record in records]
    return {
        "before": statistics.mean(record[key]["before"] for record in records),
        "after": statistics.mean(after),
        "after_sd": statistics.stdev(after) if len(after) > 1 else 0.0,
    }


def render_table(summary: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"# Fine-tuning on {summary['task']}: full, experts, and LoRA of the same size",
        "",
        "Loss in nats per trained token on held-out rows of the task; bits per byte on held-out files of the text that "
        "the base was trained on. Mean and standard deviation over seeds, each method at the learning rate that was "
        "best for it on the task. Made by `evals/fine_tuning/compare.py`.",
        "",
        "| method | numbers trained | learning rate | seeds | task loss | base text, bits per byte |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = next(iter(summary["methods"].values()))
    before, text = first["task_loss"]["before"], first["base_text_bits_per_byte"]["before"]
    lines.append(f"| base | 0 | | | {before:.3f} | {text:.3f} |")
    for method, figures in summary["methods"].items():
        loss, bits = figures["task_loss"], figures["base_text_bits_per_byte"]
        rank = f" (rank {figures['rank']})" if figures["rank"] else ""
        lines.append(
            f"| {method}{rank} | {figures['trained']:,} | {figures['learning_rate']:g} | {figures['seeds']} | "
            f"{_spread(loss, figures['seeds'])} | "
            f"{_spread(bits, figures['seeds'])} ({bits['after'] - bits['before']:+.3f}) |"
        )
    edges = _at_the_edge(summary)
    if edges:
        lines += [
            "",
            f"For {', '.join(edges)} the best rate is the largest or smallest one tried: a better one may exist.",
        ]
    return "\n".join([*lines, ""])


def render_index(summaries: Sequence[dict[str, Any]]) -> str:
    """Markdown: every comparison in one table."""
    lines = [
        "# Fine-tuning: full, experts, and LoRA of the same size",
        "",
        "Loss in nats per trained token on held-out rows of the task, before and after, and how many bits per byte "
        "were lost on held-out files of the text that the base was trained on; each method at the rate that was "
        "best for it on the task, mean over its seeds. A name leads to the table of the comparison, beside which "
        "are the picture and the JSON with all settings. Made by `evals/fine_tuning/compare.py`.",
        "",
        "| comparison | chosen | method | numbers trained | of the model | seeds | task loss | lost on base text |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for summary in sorted(summaries, key=lambda each: each["task"]):
        for method, figures in summary["methods"].items():
            lines.append(f"| {' | '.join(_index_row(summary, method, figures))} |")
    return "\n".join([*lines, ""])


def _index_row(summary: dict[str, Any], method: str, figures: dict[str, Any]) -> list[str]:
    loss, bits = figures["task_loss"], figures["base_text_bits_per_byte"]
    size = summary["settings"].get("base", {}).get("run", {}).get("model")
    return [
        f"[{summary['task']}]({summary['task']}.md)",
        _describe_choice(summary["settings"]),
        f"{method} (rank {figures['rank']})" if figures["rank"] else method,
        f"{figures['trained']:,}",
        f"{figures['trained'] / size:.1%}" if size else "",
        str(figures["seeds"]),
        f"{loss['before']:.3f} to {loss['after']:.3f}",
        f"{bits['after'] - bits['before']:+.3f}",
    ]


def _describe_choice(settings: dict[str, Any]) -> str:
    choice = settings.get("choice", settings)
    what = f"{choice['share']:.0%} of the experts" if "share" in choice else f"experts by top-p {choice['top_p']:g}"
    extras = {"shared_experts": "shared experts", "non_expert_modules": "all that is no expert"}
    return ", ".join([what, *(words for key, words in extras.items() if choice.get(key))])


def _spread(figure: dict[str, float], seeds: int) -> str:
    """The mean with its deviation, which one seed does not have."""
    return f"{figure['after']:.3f}" + (f" ± {figure['after_sd']:.3f}" if seeds > 1 else "")


def _at_the_edge(summary: dict[str, Any]) -> list[str]:
    """Methods whose best rate has no worse ones on both sides."""
    found = []
    for method, figures in summary["methods"].items():
        rates = [point["learning_rate"] for point in summary["rates_tried"] if point["method"] == method]
        if figures["learning_rate"] in (min(rates), max(rates)):
            found.append(method)
    return found
