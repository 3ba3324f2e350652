"""`hub-moe patch conflicts`, `combine` and `rebase`: several patches of one base, and a base that moved on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import print_json, print_table, say
from .patch import AsJson, PatchName, split_name

Names = Annotated[list[str], typer.Argument(metavar="PATCH", help="Two or more, named as for `patch show`.")]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="BASE", help="Folder, or OWNER/NAME[@REVISION].", show_default="what the first patch says"
    ),
]
MethodOption = Annotated[
    str, typer.Option("--method", metavar="METHOD", help="refuse, mean, ties, dare, dare_ties or slerp.")
]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", metavar="W", help="Once per patch, in their order.", show_default="1")
]
Density = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Of numbers that are kept.", show_default="ties 0.2, dare 0.5"),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of what dare drops.", show_default="0")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder to write.")]


def conflicts(names: Names, base: BaseOption = None, method: MethodOption = "refuse", as_json: AsJson = False) -> None:
    """List where patches of one base change the same experts, and what METHOD would do there.

    Per expert: the patches, how far each moves it relative to the base's weights, for every two of them the cosine of
    their changes and the share of equal signs, and what is done: "equal" is taken as it is, "one changed" is taken from
    the one that differs from the base. --json has each tensor too.

    \b
    Examples:
      hub-moe patch conflicts alice/law-experts bob/tax-experts
      hub-moe patch conflicts runs/law/patch runs/intent/patch --base runs/demo/base/model --method ties --json
    """
    from ..patches import CombinationMethod, find_conflicts

    loaded = _load(names)
    chosen: Any = method
    table = find_conflicts(loaded, base=_base(loaded[0], names[0], base), method=CombinationMethod(chosen))
    if as_json:
        print_json(table.to_dict())
    else:
        print_conflicts(table)


def combine(
    names: Names,
    out: OutOption,
    base: BaseOption = None,
    method: MethodOption = "refuse",
    weight: Weights = None,
    density: Density = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Combine patches of one base into one patch.

    Experts that only one patch changes are taken byte for byte. Where several change the same: "refuse" lists the
    conflicts and writes nothing; "mean" is the weighted mean of the changes; "ties" (arXiv:2306.01708) keeps the
    largest numbers and the signs that prevail; "dare" (arXiv:2311.03099) drops numbers at random and scales up the
    others, "dare_ties" then elects signs; "slerp" goes half way along the arc between two. Routers and balancing bias
    are averaged by all of them.

    \b
    Examples:
      hub-moe patch combine alice/law-experts bob/tax-experts --out law-and-tax
      hub-moe patch combine runs/law/patch runs/intent/patch --method ties --density 0.3 --out both
      hub-moe patch combine a b --base my-moe --method mean --weight 2 --weight 1 --out both --json
    """
    from ..patches import CombinationMethod, combine_patches

    chosen: Any = method
    how = CombinationMethod(chosen, weights=tuple(weight) if weight else None, density=density, seed=seed)
    loaded = _load(names)
    combined = combine_patches(loaded, base=_base(loaded[0], names[0], base), method=how)
    written = combined.patch.save(out)
    if as_json:
        print_json({"out": str(out), "patch": written.to_dict(), "conflicts": combined.table.to_dict()})
        return
    print_conflicts(combined.table)
    extent = f"{written.num_experts} routed experts in {len(written.experts)} layers"
    say(f"The patch of {len(names)} contributors, {extent}, is in {out}.")


def rebase(
    name: PatchName,
    onto: Annotated[str, typer.Option("--onto", metavar="BASE", help="Folder, or OWNER/NAME[@REVISION].")],
    out: OutOption,
    as_json: AsJson = False,
) -> None:
    """Move a patch to a newer commit of its base, if nothing that it changes has changed there.

    Compares hashes; of a repo only the files are fetched that hold tensors of the patch. If the newer base changed any
    of them, they are listed and nothing is written.

    \b
    Examples:
      hub-moe patch rebase alice/law-experts --onto bob/my-moe@main --out law-rebased
    """
    from ..patches import ExpertPatch, rebase_patch

    rebased = rebase_patch(ExpertPatch.load(**split_name(name)), onto)
    written = rebased.save(out)
    if as_json:
        print_json({"out": str(out), "patch": written.to_dict()})
        return
    say(f"The patch for {written.base} is in {out}.")


def _load(names: Sequence[str]) -> list[Any]:
    from ..patches import ExpertPatch

    return [ExpertPatch.load(**split_name(name)) for name in names]


def _base(loaded: Any, name: str, base: str | None) -> str:
    from ..patches.bases import Place, find_base

    place = find_base(loaded.metadata.base, found_in=Place(split_name(name)["name_or_path"]), instead=base)
    return place.name if place.revision is None else f"{place.name}@{place.revision}"


def print_conflicts(table: Any) -> None:
    """The table of what patches have in common."""
    if table.units:
        print_table(("Experts", "patches", "changes", "cosine", "signs", "outcome"), [_row(row) for row in table.units])
    else:
        say("No two patches hold the same tensor.")
    for note in table.notes:
        say(f"Note: {note}")


def _row(row: Any) -> tuple[str, ...]:
    layer = "" if row.layer is None else f"layer {row.layer} "
    part = f"expert {row.expert}" if row.expert is not None else row.kind.replace("_", " ")
    pairs = row.agreements
    return (
        f"{layer}{part}",
        ", ".join(row.patches),
        ", ".join(f"{change:.2%}" for change in row.changes),
        ", ".join("-" if pair.cosine is None else f"{pair.cosine:.3f}" for pair in pairs),
        ", ".join("-" if pair.sign_agreement is None else f"{pair.sign_agreement:.0%}" for pair in pairs),
        ", ".join(row.outcomes),
    )
