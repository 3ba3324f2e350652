"""`hub-moe export`: a HubMoe checkpoint as a native DeepSeek one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .output import describe_bytes, print_json, print_table


def export(
    source: Annotated[str, typer.Argument(help="Folder or repo id of the checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[Literal["deepseek_v3", "deepseek_v2"], typer.Option(help="Model type to write.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one safetensors file.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a HubMoe checkpoint as a native DeepSeek one.

    The result has the same weights, bit for bit, and loads with stock transformers where hub_moe is not installed.
    Prints what was written, kind by kind, read back from the disk and compared with the source.

    \b
    Examples:
      hub-moe export runs/demo/base/model native --to deepseek_v3
      hub-moe export me/my-moe native --to deepseek_v2 --max-shard-size 2GB
    """
    from ..modeling.export import export_checkpoint

    report = export_checkpoint(source, str(destination), to=to, max_shard_size=max_shard_size)
    if as_json:
        print_json(report.to_dict())
        return
    rows = [
        (
            kind.kind,
            str(kind.tensors),
            describe_bytes(kind.size_bytes),
            kind.expected,
            str(kind.changed),
            kind.sha256[:12],
        )
        for kind in report.kinds
    ]
    print_table(("Tensors", "number", "size", "expected", "changed", "sha256"), rows)
