"""`hub-moe eval`: standard tasks, with everything a stranger needs to repeat and check the numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    pass


def evaluate(  # noqa: PLR0913 (a parameter is a flag)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id: model, expert patch or adapter.")],
    suite: Annotated[str, typer.Option(metavar="NAME", help="A suite's name, or a TOML file of your own.")] = "quick",
    base: Annotated[
        str | None, typer.Option(metavar="MODEL[@REVISION]", help="Evaluate this too, and compare MODEL with it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag, commit or refs/pr/N of MODEL.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in MODEL's repo it lies, such as patches/law.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Only these entries of the suite.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Instead of the suite's number of examples.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with files in place of the Hub's datasets.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record is written.")] = Path("evals"),
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 ...")] = "auto",
    experts: Annotated[str | None, typer.Option(help="How experts are computed: grouped_mm, eager ...")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0.", show_default="a GPU if there is one")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence.", show_default="the model's")] = None,
    reuse_prefix: Annotated[
        bool, typer.Option("--reuse-prefix/--plain", help="Compute what prompts share once; same scores.")
    ] = True,
    noise_floor: Annotated[bool, typer.Option("--noise-floor", help="Measure what rounding does to answers.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask an OpenAI-compatible server that serves MODEL.")
    ] = None,
    endpoint_kind: Annotated[Literal["completions", "chat"], typer.Option(help="Of the endpoint.")] = "completions",
    tokenizer: Annotated[str | None, typer.Option(help="Of an endpoint whose MODEL is no folder or Hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies beside the weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the suite, say what it takes, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Evaluate a model by a suite of standard tasks (lm_eval's), and keep the evidence.

    The record in DIR names every file by its hash, the data, every prompt and answer, versions and the command; two
    records of the same questions are compared by `hub-moe compare`, and a stranger checks one by `hub-moe verify`.
    Ctrl-C or a crash loses nothing: the same command goes on where it stopped. `hub-moe suites` lists the suites.

    \b
    Examples:
      hub-moe eval runs/demo/model --suite offline
      hub-moe eval alice/law-experts --suite standard --base alice/base@main --limit 200
      hub-moe eval alice/base --revision refs/pr/3 --suite quick --dry-run
      hub-moe eval my-model --suite gsm8k --data-dir data --noise-floor
      hub-moe eval served-name --endpoint http://localhost:8000/v1 --tokenizer alice/base --suite quick
    """
    from ..evals.models import ModelRequest

    request = ModelRequest(
        reference=model,
        revision=revision,
        subfolder=subfolder,
        dtype=dtype,
        experts=experts,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        reuse_prefix=reuse_prefix,
        trust_remote_code=trust_remote_code,
        endpoint=endpoint,
        endpoint_kind=endpoint_kind,
        tokenizer=tokenizer,
    )
    wanted = _Wanted(suite, tasks.split(",") if tasks else [], limit, num_fewshot, data_dir)
