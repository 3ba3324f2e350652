"""Imports inside hub_moe point downwards: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A layer is a module directly below hub_moe; "" is hub_moe/__init__.py, whose names are lazy.
# An entry allows a module and everything inside it.
ALLOWED = {
    "": {"loading", "modeling", "patches"},
    "errors": set(),
    "bars": set(),
    "environment": set(),
    "files": {"errors"},
    "energy": {"errors", "files"},
    "anatomy": {"errors", "files"},
    # so that whoever can load a base can load its patches, and its experts run fast
    "modeling": {"errors", "patches.registration", "experts"},
    "experts": {"errors", "anatomy"},
    "loading": {"errors", "anatomy", "modeling"},
    "data": {"errors"},
    "cards": {"errors", "files", "energy", "evals.records", "patches.metadata"},
    "patches": {"errors", "files", "anatomy"},
    "plots": {"errors"},
    "training": {
        "bars",
        "environment",
        "errors",
        "files",
        "energy",
        "anatomy",
        "data",
        "experts",
        "modeling",
        "patches",
        "plots",
    },
    "evals": {"environment", "errors", "files", "energy", "anatomy", "data", "experts", "modeling", "patches", "plots"},
    "hub": {"errors", "files", "cards", "evals.records", "patches.metadata"},
    "hubserver": {"errors", "cards"},
}
ALLOWED["collaboration"] = set(ALLOWED) - {"", "hubserver"}
ALLOWED["demo"] = set(ALLOWED) - {""}
ALLOWED["cli"] = set(ALLOWED) - {""}
ALLOWED["__main__"] = {"cli"}
CLI_IMPORTS_OUTSIDE_FUNCTIONS = {"errors", "cli", "typer", "rich"}
NEVER_TORCH = {"files", "energy", "cards", "hub", "hubserver"}


def find_violations(source, module):
    """One line for each import that `module`, say "hub_moe.cards.__init__", may not make."""
    layer = _layer(module)
    if layer not in ALLOWED:
        return [f"{module}: give the layer {layer!r} a row in {Path(__file__).name}"]
    return [
        f"{module}:{line} imports {target}"
        for target, line, is_waiting in find_imports(source, module)
        if not _may_import(layer, target, is_waiting)
    ]


def find_imports(source, module):
    """Every import of a text, as `(dotted name, line, whether it waits)`: in a function, or for a type checker."""
    tree = ast.parse(source)
    waiting = {node for block in ast.walk(tree) if _waits(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in _targets(node, module):
                yield target, node.lineno, node in waiting


def _waits(block):
    if isinstance(block, ast.If):
        return isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING" and not block.orelse
    return isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)


def _targets(node, module):
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return names
    base = module.split(".")[: -node.level] if node.level else []
    if node.module:
        base = [*base, node.module]
    return [".".join([*base, name]) for name in names]


def _layer(dotted_name):
    first = [*dotted_name.split("."), ""][1]
    return "" if first == "__init__" else first


def _may_import(layer, target, is_waiting):
    root, _, inner = target.partition(".")
    if layer == "cli" and not is_waiting and root not in sys.stdlib_module_names:
        return (_layer(target) if root == "hub_moe" else root) in CLI_IMPORTS_OUTSIDE_FUNCTIONS
    if root != "hub_moe":
        return root != "torch" or layer not in NEVER_TORCH
    if _layer(target) == layer or inner == "__version__":
        return True
    return any(f"{inner}.".startswith(f"{allowed}.") for allowed in ALLOWED[layer])


def _module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sorted((ROOT / "hub_moe").rglob("*.py")), ids=_module)
def test_imports_point_downwards(path):
    assert find_violations(path.read_text(encoding="utf-8"), _module(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hub_moe.cards.render", "from ..modeling import HubMoeConfig"),
        ("hub_moe.cards.render", "from .. import modeling"),
        ("hub_moe.cards.render", "import hub_moe.modeling"),
        ("hub_moe.cards.render", "from hub_moe import HubMoeConfig"),
        ("hub_moe.cards.__init__", "from ..data.hub import load"),
        ("hub_moe.cards.facts", "def count():\n    import torch"),
        ("hub_moe.hub.publish", "from torch.nn import Module"),
        ("hub_moe.hub.review", "from ..evals.run import evaluate"),
        ("hub_moe.hubserver.app", "from ..hub import publish"),
        ("hub_moe.modeling.losses", "def loss():\n    from ..anatomy import find_experts"),
        ("hub_moe.modeling.__init__", "from ..patches.applying import apply_patch"),
        ("hub_moe.hub.contribute", "from ..patches.expert_patch import ExpertPatch"),
        ("hub_moe.training.train", "from ..evals.records import Record"),
        ("hub_moe.errors", "from .anatomy import find_experts"),
        ("hub_moe.cli.main", "import torch"),
        ("hub_moe.cli.main", "from ..modeling import HubMoeConfig"),
        ("hub_moe.cli.main", "if True:\n    import transformers"),
        ("hub_moe.cli.main", "if TYPE_CHECKING:\n    import typer\nelse:\n    import torch"),
        ("hub_moe.plots.experts", "from ..anatomy import ExpertProfile"),
        ("hub_moe.demo", "from .cli.main import app"),
        ("hub_moe.newcomer", "import json"),
    ],
)
def test_the_check_finds_an_import_that_the_table_forbids(module, source):
    assert len(find_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hub_moe.__init__", "if TYPE_CHECKING:\n    from hub_moe.modeling import HubMoeConfig"),
        (
            "hub_moe.cards.render",
            "import json\nfrom .. import __version__\nfrom .facts import Facts",
        ),
        ("hub_moe.cards.__init__", "from . import facts\nfrom ..errors import ConfigError"),
        (
            "hub_moe.experts.fast.__init__",
            "import torch\nfrom ..naive import f\nfrom ...anatomy import g",
        ),
        ("hub_moe.hub.review", "from ..evals.records import Record\nfrom ..evals import records"),
        (
            "hub_moe.cli.main",
            "import typer\nfrom .inspect import inspect\nfrom ..errors import HubMoeError",
        ),
        ("hub_moe.cli.data", "if TYPE_CHECKING:\n    from ..data import DataReport"),
        (
            "hub_moe.cli.main",
            "def train():\n    import torch\n    from ..training.train import train",
        ),
        (
            "hub_moe.demo",
            "import torch\nfrom .modeling import HubMoeConfig\nfrom .evals import run",
        ),
    ],
)
def test_the_check_lets_an_import_pass_that_the_table_allows(module, source):
    assert find_violations(source, module) == []
