"""`hub-moe train`: a training run from a TOML file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import describe_bytes, describe_count, print_json, print_table, print_text, say


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.TOML", help="The run: model, data, method, training, output.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove an earlier run in the folder first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a model, chosen experts of it, or an adapter, and prove what was trained.

    Methods: full, experts (ESFT: an expert patch comes out), lora, pretrain. Ctrl-C leaves a checkpoint; the same
    command goes on from there. The run folder holds the result, run.toml with every default, what_changed.json,
    metrics.jsonl and report.json. Works under torchrun, and there shares out the model too: [training] fsdp_size
    (FSDP2) and ep_size (expert parallelism), for full and pretrain.

    \b
    Examples:
      hub-moe train run.toml
      hub-moe train run.toml --set training.steps=10 --dry-run
      torchrun --nproc-per-node 2 -m hub_moe train run.toml
      torchrun --nproc-per-node 2 -m hub_moe train run.toml --set training.fsdp_size=2
    """
    from ..training import read_run_config, run_training
    from ..training.preview import preview_run
    from ..training.processes import is_first

    config = read_run_config(run, settings or ())
    if dry_run:
        facts = preview_run(config)
        if is_first():
            print_json(facts) if as_json else _print_preview(facts)
        return
    result = run_training(config, fresh=fresh, say=say)
    if not is_first():
        return
    if as_json:
        print_json(result.report)
        return
    _print_changes(result.changes)
    print_text()
    _print_report(result.report)
    say(f"The result is in {result.result}, everything about it in {result.folder}.")


def _print_report(report: dict[str, Any]) -> None:
    loss, numbers = report["held_out_loss"], report["numbers"]
    rows = [
        ("held-out loss before", f"{loss['before']:.4f} nats per token"),
        ("held-out loss after", f"{loss['after']:.4f} nats per token"),
        ("trained", f"{describe_count(numbers['trained'])} of {describe_count(numbers['model'])} numbers"),
        ("tokens", f"{report['tokens']:,} in {report['steps']:,} steps"),
        ("speed", f"{report['tokens_per_s']:,.0f} tokens/s"),
        ("peak memory", describe_bytes(report["peak_memory_bytes"])),
    ]
    print_table(("Result", ""), rows)


def _print_changes(changes: dict[str, Any]) -> None:
    rows = [
        (
            row["kind"].replace("_", " "),
            "" if row["layer"] is None else str(row["layer"]),
            *(f"{row[name]:,}" if row[name] else "-" for name in ("tensors", "trained_tensors", "changed_tensors")),
            row["sha256_before"][:8],
            row["sha256_after"][:8],
        )
        for row in changes["rows"]
    ]
    totals = changes["totals"]
    total = ("model", "", *(f"{totals[name]:,}" for name in ("tensors", "trained_tensors", "changed_tensors")), "", "")
    print_table(("Tensors", "layer", "all", "trained", "changed", "before", "after"), rows, [total])
    if "adapter" in changes:
        print_text(f"Beside them an adapter of {describe_count(changes['adapter']['numbers'])} numbers was trained.")


def _print_preview(facts: dict[str, Any]) -> None:
    rows = [
        (
            kind.replace("_", " "),
            describe_count(row["numbers"]),
            describe_count(row["trained"]) if row["trained"] else "-",
        )
        for kind, row in facts["by_kind"].items()
    ]
    if facts["adapter"]:
        rows.append(("adapter", "", describe_count(facts["adapter"])))
    print_table(("Numbers", "all", "trained"), rows, [("model", *map(describe_count, facts["numbers"].values()))])
    print_text()
    memory = facts["memory_bytes"]
    figures = [
        ("training rows", f"{facts['rows']:,}"),
        ("held-out rows", f"{facts['held_out_rows']:,}"),
        ("tokens of all rows", f"{facts['tokens']:,}"),
        ("steps", f"{facts['steps']:,}"),
        ("tokens in these steps", f"about {facts['tokens_in_run']:,}"),
        ("weights", describe_bytes(memory["weights"])),
        ("gradients and optimizer", describe_bytes(memory["gradients"] + memory["optimizer"])),
    ]
    print_table((f"Run by {facts['method']}", ""), figures)
    print_text("\nMemory of each process; activations come on top, and depend on the rows at a time.")
