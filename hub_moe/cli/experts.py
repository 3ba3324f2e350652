"""`hub-moe experts`: what each expert does on a task, and which ones to train on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import ConfigError
from .data import ChatTemplate, Settings, load_source, load_tokenizer
from .output import describe_count, print_json, print_table, print_text, say, show_progress

if TYPE_CHECKING:
    from ..anatomy import DomainProfile, ExpertProfile
    from ..training.profiling import Sample
    from ..training.selection import ExpertChoice, Scores

experts = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure experts on a task and choose which ones to train."
)


@experts.command()
def score(  # noqa: PLR0913 (a parameter is a flag)
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or folder; with --traces only the model's name.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="The task's rows: Hub dataset, folder or file; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Expert profile to write.")] = Path("profile.json"),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL.")] = None,
    settings: Settings = None,
    chat_template: ChatTemplate = None,
    rows: Annotated[int, typer.Option(min=1, help="Size of the sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    max_length: Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Most tokens of a row.")] = 4096,
    allow_bad_rows: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Go on if no more rows than this do not fit.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 4,
    norms: Annotated[
        bool, typer.Option("--norms", help="Measure output norms too; about doubles the work of the experts.")
    ] = False,
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the task.", show_default="that of the data")
    ] = None,
    traces: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Read ESFT's routing traces instead of running MODEL.")
    ] = None,
    num_experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, with --traces.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token, with --traces.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON.")] = False,
) -> None:
    """Measure how much each expert has to do on a task: an expert profile.

    Runs MODEL on a sample of the task's own rows, prompts and answers, and writes tokens and gate mass of each expert,
    with --norms its output norms too. Or reads the traces that ESFT released (arXiv:2407.01906): a folder of
    layer_N.txt; 64 experts and 6 a token are those of DeepSeek-V2-Lite.

    \b
    Examples:
      hub-moe experts score deepseek-ai/DeepSeek-V2-Lite --data law.jsonl --out law.json
      hub-moe experts score my-model --data openai/gsm8k --set config=main --rows 64
      hub-moe experts score --traces law/routing --domain law --out law.json
    """
    _check_folder(out)
    if (traces is None) == (data is None):
        raise ConfigError("Give either MODEL and --data, or --traces.")
    if traces is not None:
        from ..training.routing_traces import read_traces

        name = domain or traces.resolve().name
        profile = read_traces(traces, num_experts=num_experts, top_k=top_k, domain=name, model=model or "unknown")
    elif model is None:
        raise ConfigError("Give the MODEL to run on --data.")
    else:
        source = load_source(data or [], settings)
        tokenizer = load_tokenizer(model, chat_template, revision)
        from ..training.profiling import draw_sample

        sample = draw_sample(
            source,
            tokenizer,
            num_rows=rows,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            allow_bad_rows=allow_bad_rows,
        )
        name = domain or Path(source.provenance.source).stem
        profile = _run(
            _load_model(model, revision, tokenizer), (model, revision), sample, domain=name, output_norms=norms
        )
    profile.save(out)
    if as_json:
        print_json(profile.to_dict())
    else:
        _print_profile(profile)
    say(f"Wrote {out}.")


@experts.command()
def select(  # noqa: PLR0913 (a parameter is a flag)
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="What `score` wrote.")],
    score: Annotated[
        Literal["token", "gate"], typer.Option(help="Share of the tokens, or mean routing weight.")
    ] = "token",
    top_p: Annotated[
        float | None,
        typer.Option(help="In each layer, choose until the scores add up to this.", show_default="0.2"),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Instead, choose this share of all experts, by the scores of all layers.")
    ] = None,
    normalise: Annotated[
        bool, typer.Option("--normalise", help="Divide a layer's scores by their sum, as ESFT does not.")
    ] = False,
    domain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Task in the profile.", show_default="the only one")
    ] = None,
    shared_experts: Annotated[bool, typer.Option("--shared-experts", help="Train the shared experts, too.")] = False,
    non_expert_modules: Annotated[
        bool, typer.Option("--non-expert-modules", help="Train attention, norms and all else, too.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Choice to write, in ESFT's form.")] = Path("expert_config.json"),
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a heat map (png, svg, pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print choice and scores as JSON.")] = False,
) -> None:
    """Choose the experts to train on a task, as ESFT does (arXiv:2407.01906, section 3.2).

    In each layer those with the highest scores, rounded to four decimals, until the scores add up to --top-p. Or, with
    --share, so many of all experts, whatever their layer, so that the size of the patch is known beforehand. The gate
    scores of a layer add up to what a token's routing weights do, which is below 1 for some models, and above for
    others; --normalise makes a share of them.

    \b
    Examples:
      hub-moe experts select law.json
      hub-moe experts select law.json --share 0.1
      hub-moe experts select law.json --score gate --top-p 0.1 --out gate.json --plot law.png
    """
    from dataclasses import replace

    from ..anatomy import ExpertProfile
    from ..training.selection import score_experts, select_experts

    for path in (out, plot):
        _check_folder(path)
    measured = ExpertProfile.load(profile)
    scores = score_experts(measured, score=score, domain=domain, normalise=normalise)
    selected = select_experts(scores, top_p=0.2 if top_p is None and share is None else top_p, share=share)
    choice = replace(selected, shared_experts=shared_experts, non_expert_modules=non_expert_modules)
    choice.save(out)
    if plot is not None:
        _draw(plot, scores, choice, f"{measured.model}: experts chosen on {domain or next(iter(measured.domains))}")
    facts = _describe(measured, scores, choice)
    if as_json:
        print_json({**choice.to_dict(), **facts, "scores": {str(i): list(row) for i, row in scores.layers.items()}})
    else:
        _print_choice(scores, choice, facts)
    say(f"Wrote {out}{'' if plot is None else f' and {plot}'}.")


def _check_folder(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and not path.expanduser().resolve().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")


def _load_model(name: str, revision: str | None, tokenizer: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from ..data import check_tokenizer

    logging.set_verbosity_error()
    path = Path(name).expanduser()
    source = str(path) if path.is_dir() else name
    check_tokenizer(tokenizer, AutoConfig.from_pretrained(source, revision=revision))
    return AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype="auto", device_map="auto")


def _run(
    model: Any, source: tuple[str, str | None], sample: "Sample", *, domain: str, output_norms: bool
) -> "ExpertProfile":
    from ..environment import find_commit
    from ..training.profiling import profile_experts

    name, commit = source[0], find_commit(*source)
    path = Path(name).expanduser()
    public_name = path.resolve().name if path.is_dir() else name  # a profile is published, the folder's place is not
    with show_progress("running") as advance:
        return profile_experts(
            model,
            sample,
            name=public_name,
            revision=commit,
            domain=domain,
            output_norms=output_norms,
            on_batch=advance,
        )


def _print_profile(profile: "ExpertProfile") -> None:
    for name, domain in profile.domains.items():
        at = f" at {profile.revision[:12]}" if profile.revision else ""
        print_text(
            f"{profile.model}{at} on {name}: {domain.num_tokens:,} tokens of {domain.num_sequences:,} sequences.\n"
        )
        print_table(("Layer", "imbalance", "idle experts", "busiest", "its share", "gate a token"), _rows(domain))


def _rows(domain: "DomainProfile") -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for index, layer in domain.layers.items():
        shares = layer.token_shares
        busiest = max(range(len(shares)), key=shares.__getitem__)
        gate = sum(layer.gate_mass) / max(1, domain.num_tokens)
        figures = (f"{layer.imbalance:.2f}", f"{layer.num_dead} of {len(shares)}", str(busiest))
        rows.append((str(index), *figures, f"{shares[busiest]:.1%}", f"{gate:.3f}"))
    return rows


def _describe(profile: "ExpertProfile", scores: "Scores", choice: "ExpertChoice") -> dict[str, Any]:
    num_experts = sum(map(len, scores.layers.values()))
    facts: dict[str, Any] = {
        "chosen": choice.num_experts,
        "of_experts": num_experts,
        "share_of_experts": choice.num_experts / num_experts,
        "chosen_parameters": None,
        "share_of_parameters": None,
    }
    if profile.num_per_expert is not None and profile.num_parameters is not None:
        facts["chosen_parameters"] = choice.num_experts * profile.num_per_expert
        facts["share_of_parameters"] = facts["chosen_parameters"] / profile.num_parameters
    return facts


def _print_choice(scores: "Scores", choice: "ExpertChoice", facts: dict[str, Any]) -> None:
    rows = [
        (
            str(index),
            f"{len(chosen)} of {len(scores.layers[index])}",
            f"{len(chosen) / len(scores.layers[index]):.1%}",
            f"{sum(scores.layers[index][expert] for expert in chosen):.4f}",
            " ".join(map(str, chosen)),
        )
        for index, chosen in choice.experts.items()
    ]
    total = ("all", f"{facts['chosen']} of {facts['of_experts']}", f"{facts['share_of_experts']:.1%}", "", "")
    print_table(("Layer", "chosen", "share", "score", "experts, best first"), rows, [total])
    if facts["chosen_parameters"] is not None:
        print_text(
            f"\nThe chosen experts hold {describe_count(facts['chosen_parameters'])} parameters, "
            f"{facts['share_of_parameters']:.1%} of the model."
        )
    beside = [
        name
        for name, is_trained in (
            ("the shared experts", choice.shared_experts),
            ("all modules that are no experts", choice.non_expert_modules),
        )
        if is_trained
    ]
    if beside:
        print_text(f"Trained beside them, and not counted here: {' and '.join(beside)}.")


def _draw(path: Path, scores: "Scores", choice: "ExpertChoice", title: str) -> None:
    from ..plots import plot_expert_heat_map

    label = {"token": "share of tokens", "gate": "mean routing weight"}[scores.score]
    try:
        plot_expert_heat_map(scores.layers, choice=choice.experts, title=title, label=label).savefig(path)
    except ValueError as error:  # matplotlib's own sentence about an ending it does not know
        raise ConfigError(f"{path} cannot be drawn: {error}.") from error
