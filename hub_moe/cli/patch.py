"""`hub-moe patch`: look at expert patches, compare and verify them, and merge them into their base."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError, PatchError
from .output import describe_bytes, describe_count, print_json, print_table, print_text, say

patch = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Compare and verify expert patches, combine them, merge them into their base.",
)

_PATCH = "Folder, or OWNER/NAME[/SUBFOLDER][@REVISION] on a Hub."
_BASE = "Folder of the base, or OWNER/NAME[@REVISION]"
PatchName = Annotated[str, typer.Argument(metavar="PATCH", help=_PATCH)]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
BaseOption = Annotated[str | None, typer.Option("--base", metavar="BASE", help=f"{_BASE}.")]


def split_name(name: str) -> dict[str, Any]:
    """The arguments of `ExpertPatch.load` for a patch as the command line names it."""
    match = re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+))?(?:@(?P<revision>[^@]+))?", name)
    if Path(name).expanduser().is_dir() or match is None:
        return {"name_or_path": name}
    return {"name_or_path": match["repo"], "subfolder": match["folder"], "revision": match["revision"]}


@patch.command()
def show(
    name: PatchName,
    base: BaseOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a heat map of layers and experts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a patch changes, in which base, and how it was made.

    Reads the metadata only. With --base it also measures how far each expert moved: the norm of the change relative
    to the norm of the base's weights.

    \b
    Examples:
      hub-moe patch show runs/law/patch
      hub-moe patch show alice/law-experts --base alice/my-moe --plot heat.png
      hub-moe patch show alice/my-moe/patches/law@main --json
    """
    from ..patches import PatchMetadata
    from ..patches.folders import find_patch
    from ..patches.metadata import METADATA_FILE

    metadata = PatchMetadata.read(find_patch(**split_name(name), files=[METADATA_FILE]))
    changes = _measure(name, base) if base is not None else None
    if plot is not None:
        _draw(metadata, changes, name, plot)
    if as_json:
        facts = metadata.to_dict()
        print_json(facts if changes is None else {**facts, "changes": changes})
        return
    _print_facts(metadata, name)
    if changes is None:
        rows = [(str(layer), ", ".join(map(str, chosen))) for layer, chosen in metadata.experts.items()]
        print_table(("Layer", "experts"), rows)
    else:
        print_table(("Layer", "expert", "change"), [(*_label(row), f"{row['change']:.2%}") for row in changes])


@patch.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help=_PATCH)],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="Another patch; left out, A against its base.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help=f"{_BASE}: also compare sizes and directions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two patches expert by expert, or a patch with its base.

    Without --base: which experts both change, and whether to the same numbers. With --base also the size of each change
    relative to the base's weights, the cosine between the two changes, and the distance of the two results relative to
    the larger change. A against its base fetches the base where --base is not given.

    \b
    Examples:
      hub-moe patch diff runs/law/patch runs/intent/patch
      hub-moe patch diff alice/law-experts bob/law-experts --base alice/my-moe@main
      hub-moe patch diff runs/law/patch --json
    """
    from ..patches import ExpertPatch, diff_patches

    if second is None:
        changes = _measure(first, base)
        if as_json:
            print_json(changes)
        else:
            print_table(("Layer", "expert", "change"), [(*_label(row), f"{row['change']:.2%}") for row in changes])
        return
    ours, theirs = (ExpertPatch.load(**split_name(name)) for name in (first, second))
    folder = _fetch_base(ours.metadata, first, base) if base is not None else None
    difference = diff_patches(ours, theirs, base=folder)
    if as_json:
        print_json(difference.to_dict())
        return
    _print_difference(difference)
    if base is None:
        say("Sizes and directions of the changes need the base: --base.")


@patch.command()
def verify(name: PatchName, base: BaseOption = None, as_json: AsJson = False) -> None:
    """Check every hash of a patch, and with --base those of the tensors that it replaces.

    Exit code 1 if anything is wrong.

    \b
    Examples:
      hub-moe patch verify runs/law/patch
      hub-moe patch verify alice/law-experts --base alice/my-moe
    """
    from ..patches import PatchMetadata, verify_patch
    from ..patches.folders import find_patch
    from ..patches.metadata import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE

    folder = find_patch(**split_name(name), files=(METADATA_FILE, WEIGHTS_FILE, CONFIG_FILE))
    base_folder = _fetch_base(PatchMetadata.read(folder), name, base) if base is not None else None
    verification = verify_patch(folder, base=base_folder)
    if as_json:
        print_json(verification.to_dict())
    else:
        _print_verification(verification)
    if not verification.is_right:
        raise typer.Exit(1)


def merge_into_base(
    name: PatchName,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help=f"{_BASE}.", show_default="what the patch says, at its commit"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the base with the patch applied, as a full checkpoint in the base's own layout.

    No model is loaded: files are copied, and the patch's tensors written in their place. Then everything is read back,
    and every byte outside of the patch compared with the base. `apply` and `merge-into-base` are one command.

    \b
    Examples:
      hub-moe patch merge-into-base alice/law-experts --out law-model
      hub-moe patch apply runs/law/patch --base runs/demo/base/model --out law-model
    """
    from ..patches import merge_into_base as merge

    report = merge(**split_name(name), target=out, base=base)
    if as_json:
        print_json(report.to_dict())
        return
    rows = [
        (
            kind.kind.replace("_", " "),
            "" if kind.layer is None else str(kind.layer),
            str(kind.tensors),
            str(kind.patched),
            str(kind.changed),
            kind.sha256_before[:12],
            kind.sha256_after[:12],
        )
        for kind in report.kinds
    ]
    print_table(("Tensors", "layer", "number", "patched", "changed", "sha256", "after"), rows)
    say(f"{report.base} with the patch is in {report.target}.")


for command_name in ("apply", "merge-into-base"):
    patch.command(command_name)(merge_into_base)


def _fetch_base(metadata: Any, name: str, base: str | None) -> Path:
    from ..patches.bases import Place, fetch_base, find_base

    return fetch_base(find_base(metadata.base, found_in=Place(str(split_name(name)["name_or_path"])), instead=base))


def _measure(name: str, base: str | None) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from ..patches import ExpertPatch, measure_changes

    loaded = ExpertPatch.load(**split_name(name))
    return [asdict(change) for change in measure_changes(loaded, _fetch_base(loaded.metadata, name, base))]


def _label(row: dict[str, Any]) -> tuple[str, str]:
    is_expert = row["kind"] == "routed_experts"
    return (str(row["layer"]), str(row["expert"])) if is_expert else (row["kind"].replace("_", " "), "")


def _print_facts(metadata: Any, name: str) -> None:
    parts = ("shared_experts", "non_expert_modules", "balancing_bias")
    selection = metadata.selection
    rows = [
        ("base", metadata.base.repo),
        ("commit", metadata.base.commit or "not known (a folder)"),
        ("model type", metadata.base.model_type),
        ("routed experts", f"{metadata.num_experts} in {len(metadata.experts)} layers"),
        ("also changed", ", ".join(part.replace("_", " ") for part in parts if getattr(metadata, part)) or "nothing"),
        ("numbers", describe_count(metadata.num_parameters)),
        ("size", describe_bytes(metadata.size_bytes)),
        ("method", metadata.method or "not stated"),
    ]
    if metadata.combination is not None:
        rows.append(("combined by", metadata.combination.method))
        rows.append(("contributors", ", ".join(map(str, metadata.combination.contributors))))
    if metadata.rebased_from:
        rows.append(("rebased from", ", ".join(map(str, metadata.rebased_from))))
    if selection is not None:
        score = f"{selection.score} score" if selection.score else ""
        top_p = f"top_p {selection.top_p}" if selection.top_p is not None else ""
        share = f"{selection.share:.3g} of all experts" if selection.share is not None else ""
        rows.append(("selection", ", ".join(filter(None, (selection.method, score, top_p, share)))))
    print_table(("Patch", name), rows)
    print_text()


def _print_difference(difference: Any) -> None:
    from dataclasses import asdict

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    rows = [
        (
            *_label(asdict(row)),
            {"both": "both", "first": "A", "second": "B"}[row.found_in],
            ("yes" if row.is_equal else "no") if row.found_in == "both" else "",
            percent(row.change),
            percent(row.other_change),
            "" if row.cosine is None else f"{row.cosine:.3f}",
            percent(row.distance),
        )
        for row in difference.rows
    ]
    print_table(("Layer", "expert", "in", "equal", "change A", "change B", "cosine", "distance"), rows)
    if difference.has_same_base is not True:
        say("The patches are for different bases." if difference.has_same_base is False else "Their bases may differ.")


def _print_verification(verification: Any) -> None:
    counts: dict[str, list[int]] = {}
    for check in verification.checks:
        count = counts.setdefault(check.what, [0, 0])
        count[check.fault is not None] += 1
    print_table(
        ("Check", "right", "wrong"), [(what, str(right), str(wrong)) for what, (right, wrong) in counts.items()]
    )
    for check in verification.checks:
        if check.fault:
            print_text(f"WRONG  {f'{check.tensor}: ' if check.tensor else ''}{check.what} {check.fault}")


def _draw(metadata: Any, changes: list[dict[str, Any]] | None, name: str, path: Path) -> None:
    """Layers and experts of the patch; shades are sizes of change where they are known."""
    from ..plots import plot_expert_heat_map

    if not metadata.experts:
        raise PatchError(f"The patch {name} changes no routed experts that could be drawn.")
    width = 1 + max(max(chosen) for chosen in metadata.experts.values())
    sizes = {(row["layer"], row["expert"]): row["change"] for row in changes or ()}
    maps = {
        layer: [sizes.get((layer, expert), float(expert in chosen and not changes)) for expert in range(width)]
        for layer, chosen in metadata.experts.items()
    }
    label = "relative change" if changes else "changed"
    figure = plot_expert_heat_map(maps, choice=metadata.experts, title=f"Expert patch {name}", label=label)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"Cannot draw {path}: {error}.") from error
