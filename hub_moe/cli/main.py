"""The `hub-moe` command: its commands, and how every error reaches the person who typed it."""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ..errors import HubMoeError
from .card import card
from .compare import compare
from .contribute import contribute
from .data import data
from .demo import demo
from .env import env
from .eval import evaluate, lm_eval, suites
from .experts import experts
from .export import export
from .find import find
from .hub import hub
from .inspect import inspect
from .lineage import lineage
from .merge import merge
from .output import say
from .patch import patch
from .patch_combining import combine, conflicts, rebase
from .plan import plan
from .publish import publish
from .review import review
from .train import train
from .verify import verify

app = typer.Typer(
    name="hub-moe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help prints twice as fast
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (demo, env, train, inspect, plan, export):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(suites)
app.command()(compare)
app.command()(verify)
app.command()(lineage)
app.command()(find)
app.command()(contribute)
app.command()(publish)
app.command()(review)
app.command()(merge)
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(lm_eval)
app.add_typer(card, name="card")
app.add_typer(data, name="data")
app.add_typer(experts, name="experts")
app.add_typer(hub, name="hub")
patch.command()(conflicts)
patch.command()(combine)
patch.command()(rebase)
app.add_typer(patch, name="patch")


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"hub-moe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Build, measure, train and share Mixture-of-Experts models.

    \b
    Examples:
      hub-moe demo
      hub-moe inspect deepseek-v3
      hub-moe export my-model my-model-native --to deepseek_v3

    Exit codes: 0 done, 1 a known error, 2 wrong usage. HUB_MOE_DEBUG=1 shows tracebacks.
    """


def main() -> None:
    """Run the command line; a known error becomes one sentence on stderr and exit code 1."""
    _quiet_torchao()
    try:
        app()
    except SystemExit:  # also how every good end arrives: do not import for it what the next line imports
        raise
    except _known_errors() as error:
        if os.environ.get("HUB_MOE_DEBUG") == "1":
            raise
        message, hint = describe_error(error)
        say(f"Error: {message}")
        if hint:
            say(f"Hint: {hint}")
        sys.exit(1)


def _quiet_torchao() -> None:
    """No lines on stderr of every command about what torchao, where it is installed, cannot load without a GPU."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _known_errors() -> tuple[type[Exception], ...]:
    """Errors that a person causes or can mend. Others are faults of the program and keep their traceback."""
    from sqlite3 import OperationalError

    from huggingface_hub.errors import HFValidationError, RevisionResolutionError, StrictDataclassError

    return (
        *(HubMoeError, OSError, OperationalError),
        *(HFValidationError, RevisionResolutionError, StrictDataclassError),
    )


def describe_error(error: BaseException) -> tuple[str, str | None]:
    """What went wrong in one sentence, and what to try, if anything.

    transformers wraps the Hub's errors and the checks of a config in its own; the one nearest to the cause that a
    person can understand is described.
    """
    from sqlite3 import OperationalError

    from huggingface_hub import constants, errors

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, HubMoeError):
            return _first_line(cause), None
        if isinstance(cause, OperationalError):
            return f"The Hub's database cannot be used: {cause}.", "is there room, and may you write to its folder?"
        if isinstance(cause, errors.StrictDataclassError):
            return _first_line(causes[-1]), None
        repo = getattr(cause, "repo_id", None) or "The repo"
        if isinstance(cause, errors.GatedRepoError):
            return f"{repo} is gated.", "ask for access on its page, then run `hf auth login`."
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"{repo} is not on {constants.ENDPOINT}.", "check the name; a private repo needs `hf auth login`."
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repo} has no such revision.", "see the branches, tags and commits on its page."
        if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            message = f"Cannot reach {constants.ENDPOINT}, and the files are not in the local cache."
            return message, "check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
    return _first_line(error), None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
