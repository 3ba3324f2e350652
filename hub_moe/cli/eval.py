"""`hub-moe eval`: standard tasks, with everything a stranger needs to repeat and check the numbers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .compare import print_comparison
from .output import print_json, print_table, print_text, say, show_progress

if TYPE_CHECKING:
    from ..evals.models import ModelRequest
    from ..evals.preflight import Preflight
    from ..evals.records import Metric, Record


def evaluate(  # noqa: PLR0913 (a parameter is a flag)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id: model, expert patch or adapter.")],
    suite: Annotated[str, typer.Option(metavar="NAME", help="A suite's name, or a TOML file of your own.")] = "quick",
    base: Annotated[
        str | None, typer.Option(metavar="MODEL[@REVISION]", help="Evaluate this too, and compare MODEL with it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag, commit or refs/pr/N of MODEL.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in MODEL's repo it lies, such as patches/law.")] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="OWNER/NAME", help="What a folder is called in the record.")
    ] = None,
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
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let suites that need it run code that the model writes, here.")
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
      hub-moe eval runs/demo/base/model --suite offline
      hub-moe eval alice/law-experts --suite standard --base alice/base@main --limit 200
      hub-moe eval alice/base --revision refs/pr/3 --suite quick --dry-run
      hub-moe eval my-model --suite gsm8k --data-dir data --noise-floor
      hub-moe eval served-name --endpoint http://localhost:8000/v1 --tokenizer alice/base --suite quick
    """
    from ..bars import quiet_bars
    from ..cards.training_run import hide_folder
    from ..evals.models import ModelRequest
    from ..evals.session import Plan, preview
    from ..evals.session import evaluate as run_evaluation
    from ..evals.suites import load_suite

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
        name=name,
    )
    chosen = tasks.split(",") if tasks else []
    wanted = load_suite(suite, limit=limit, tasks=chosen, num_fewshot=num_fewshot)
    command = ["hub-moe", *map(hide_folder, sys.argv[1:])]  # where things lie on this machine is nobody's business
    plan = Plan(wanted, out, data_dir=data_dir, noise_floor=noise_floor, command=command, run_code=run_code)
    if dry_run:
        _print_preflight(preview(plan, request), as_json=as_json)
        return
    with quiet_bars(), show_progress("asking") as advance:
        outcome = run_evaluation(request, plan, base=_of_base(request, base), say=say, on_progress=advance)
    if as_json:
        comparison = outcome.comparison.to_dict() if outcome.comparison else None
        print_json({"record": outcome.candidate.record.to_dict(), "comparison": comparison})
        return
    print_record(outcome.candidate.record)
    if outcome.comparison:
        print_text()
        print_comparison(outcome.comparison)
    say(f"The record is {outcome.candidate.path}.")


def suites(as_json: Annotated[bool, typer.Option("--json", help="Print the declarations as JSON.")] = False) -> None:
    """List the suites that come with hub_moe.

    \b
    Examples:
      hub-moe suites
      hub-moe suites --json
    """
    from dataclasses import asdict

    from ..evals.suites import list_suites

    found = list_suites()
    if as_json:
        print_json([{**asdict(each), "sha256": each.source.sha256} for each in found])
        return
    width = max(len(each.name) for each in found)
    for each in found:
        print_text(f"{each.name:{width}}  {each.description}")
        print_text(f"{'':{width}}  {', '.join(entry.name for entry in each.entries)}")


def print_record(record: "Record") -> None:
    """The numbers for people, with how sure they are."""
    rows = []
    for entry in record.entries:
        others = [metric for metric in entry.metrics if metric is not entry.main]
        rows += [(entry.name, *_describe(entry.main), str(entry.main.num_documents))]
        rows += [("", *_describe(metric), "") for metric in others]
    print_table(("Entry", "metric", "value", "95 % interval", "documents"), rows)
    for entry in record.entries:
        if entry.num_unparsable:
            print_text(f"{entry.name}: {entry.num_unparsable} answers held nothing to score, and count as wrong.")
        if entry.num_truncated:
            print_text(
                f"{entry.name}: {entry.num_truncated} prompts were too long for the model and lost their beginning."
            )
    if record.noise_floor:
        for name, found in record.noise_floor.variations.items():
            print_text(
                f"Rounding ({name}): {found['flips']:.0f} of {record.noise_floor.num_documents} answers flip, "
                f"largest difference {found['max_difference']:.2g} nats"
            )


def _describe(metric: "Metric") -> tuple[str, str, str]:
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.4f}"
    interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4f} - {metric.high:.4f}"
    return metric.name + ("" if metric.higher_is_better else " ↓"), f"{metric.value:.4f}{error}", interval


def _of_base(request: "ModelRequest", base: str | None) -> "ModelRequest | None":
    """The base, run as the model is."""
    if base is None:
        return None
    from dataclasses import replace

    name, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    return replace(request, reference=name, revision=revision or None, subfolder=None, name=None)


def _print_preflight(found: "Preflight", *, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
    else:
        for line in found.to_lines():
            print_text(line)
    found.raise_if_blocked()


def lm_eval(context: typer.Context) -> None:
    """Pass every argument on to lm_eval's command, with our models known to it.

    `--model hf` loads HubMoe checkpoints and expert patches, and `--model hub_moe` computes what prompts share once.
    Nothing is recorded: use `hub-moe eval` for numbers that others can check. In Python, `import hub_moe.modeling` does
    the same for `lm_eval.simple_evaluate(model="hf", ...)`.

    \b
    Examples:
      hub-moe lm-eval run --model hf --model_args pretrained=runs/demo/base/model --tasks arc_easy
      hub-moe lm-eval ls tasks
      hub-moe lm-eval -- run --help        # lm_eval's own help
    """
    from .. import modeling  # noqa: F401  (registers hub_moe)
    from ..evals.prefix_lm import run_lm_eval

    raise typer.Exit(run_lm_eval(context.args))
