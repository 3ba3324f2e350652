"""`hub-moe lineage`: where a model comes from and what was made of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import print_json, say

_PICTURES = (".png", ".svg", ".pdf")

if TYPE_CHECKING:
    from rich.tree import Tree

    from ..hub.lineage_outline import Branch


def lineage(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A model on the Hub: OWNER/NAME.")],
    depth: Annotated[int, typer.Option(min=0, max=20, help="How many generations up and down.")] = 3,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many models, patches, merges...")] = 100,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it, as PNG, SVG or PDF.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tree as JSON.")] = False,
) -> None:
    """Show the tree around a model: its bases, merged and proposed expert patches, and what was made of it.

    Everything is read from the Hub that HF_ENDPOINT names: base_model of the cards, patches/NAME of the repo, the
    trailers of merges on main, and the marks of open pull requests. A review is shown with who gave it and for which
    commit. What is private or deleted is shown by its name.

    \b
    Examples:
      hub-moe lineage alice/base
      hub-moe lineage alice/base --depth 1 --json
      hub-moe lineage alice/base --plot lineage.png
    """
    from huggingface_hub import HfApi

    from ..hub.lineage import read_lineage
    from ..hub.lineage_outline import outline_lineage

    if plot is not None:
        _check_picture(plot)
    found = read_lineage(HfApi(), repo, depth=depth, limit=limit)
    root = outline_lineage(found)
    if as_json:
        print_json(found.to_dict())
    else:
        _print_tree(root)
    for note in found.notes:
        say(note)
    if plot is not None:
        _draw(root, plot)


def _check_picture(path: Path) -> None:
    from ..errors import ConfigError

    if path.suffix.lower() not in _PICTURES:
        raise ConfigError(f"Cannot draw {path}: its name must end in {', '.join(_PICTURES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"Cannot draw {path}: there is no folder {path.parent}.")


def _print_tree(root: "Branch") -> None:
    from rich.console import Console

    Console(markup=False, highlight=False).print(_make_tree(root))


def _make_tree(root: "Branch") -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    styles = {"group": "bold", "patch": "yellow", "merge": "magenta", "pull request": "green", "absent": "dim"}
    label = Text(root.name, style=styles.get(root.kind, "cyan"))
    label.append(f"  {root.about}" if root.about else "", style="dim")
    tree = Tree(label, guide_style="dim")
    for branch in root.branches:
        tree.children.append(_make_tree(branch))
    return tree


def _draw(root: "Branch", path: Path) -> None:
    from ..plots import plot_lineage

    plot_lineage(list(root.rows()), title=f"Lineage of {root.name}").savefig(path)
    say(f"Wrote {path}")
