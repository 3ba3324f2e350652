"""Options that several `hub-moe hub` commands have."""

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds everything.", envvar="HUB_MOE_HUB_ROOT")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_ROOT = Path("hub")
