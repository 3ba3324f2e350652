"""`hub-moe card`: a model card from evidence, and the check that it says nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import ConfigError, HubMoeError, MissingExtraError
from .output import print_json, print_text, say

if TYPE_CHECKING:
    from ..cards import Evidence, Facts, ModelFolder, TrainingRun
    from ..cards.facts import Picture
    from ..cards.readme import Readme
    from ..evals.records import StoredRecord


class _RenderByDefault(TyperGroup):
    """`hub-moe card MODEL` is `hub-moe card render MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_help = any(word in ("-h", "--help") for word in args[:1])
        if args and args[0] not in self.commands and not is_help:
            args = ["render", *args]
        return super().parse_args(ctx, args)


card = typer.Typer(
    cls=_RenderByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    subcommand_metavar="MODEL | COMMAND [ARGS]...",
    help="Write a model's card from its records, run and config, and check it. `card MODEL` is `card render MODEL`.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of the model, or OWNER/NAME[@REVISION] on a Hub.")]
Records = Annotated[
    list[Path] | None,
    typer.Option(
        "--records", metavar="DIR", help="Folder of records beside the model's evals/; may be repeated.", exists=True
    ),
]


@card.command()
def render(  # noqa: PLR0913 (a parameter is a flag)
    model: Model,
    records: Records = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder of hub-moe train it came from.")] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Expert profile (hub-moe experts score).")
    ] = None,
    base_record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record of the base, to compare with.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="OWNER/NAME", help="What the card calls a folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="README.md", help="Write here, not into the folder.")] = None,
    gpai: Annotated[bool, typer.Option("--gpai", help="Prefill the EU's model documentation form too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write README.md, model_card.json, .eval_results and pictures of a model.

    Every number comes from the config, a record, a run or an expert profile; what is not known is listed as not
    documented. An existing README keeps its prose and its own metadata: only what stands between the markers
    <!-- hub_moe:begin NAME --> and <!-- hub_moe:end NAME --> is replaced. Records are copied into evals/ beside it.

    \b
    Examples:
      hub-moe card runs/experts/patch --records evals/results
      hub-moe card render alice/my-moe --out card/README.md --gpai
      hub-moe card my-model --run runs/full --base-record evals/results/quick-0123456789abcdef.json
    """
    from ..cards import collect_facts, open_model, read_eval_results, read_facts, render_card, render_form

    source = open_model(model)
    source = source if name is None else replace(source, name=name)
    if out is None and source.revision is not None:
        raise ConfigError(f"{model} is on a Hub; say where to write its card: --out card/README.md.")
    target = out or source.folder / "README.md"
    old = _read_old(source, target)
    evidence = _find_evidence(source, target.parent, records=records or [], run=run, base_record=base_record)
    evidence = replace(evidence, footprint=_measure(source, evidence.run), profile=_load_profile(profile))
    previous = read_facts(target.parent) or read_facts(source.folder)
    facts = collect_facts(source, evidence, say=say, previous=previous)
    facts = replace(facts, pictures=_draw(facts, evidence, target.parent))
    made = render_card(facts, old, previous=previous, eval_results=read_eval_results(target.parent))
    _copy_records(facts, evidence, target.parent)
    made.write(target)
    written = [target.name, "model_card.json", *(f".eval_results/{each}" for each in made.eval_results)]
    if gpai:
        (target.parent / "model_documentation_form.md").write_text(render_form(facts), "utf-8")
        written.append("model_documentation_form.md")
    written += [picture.file for picture in facts.pictures]
    if as_json:
        print_json({"folder": str(target.parent), "written": written, "facts": facts.to_dict()})
    else:
        print_text("\n".join(str(target.parent / each) for each in written))


@card.command()
def lint(
    model: Model,
    records: Records = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a card: exit code 1 and every finding, if a number has no record or anything was edited.

    Looked at are the blocks between the markers (they must be what model_card.json gives), model-index and
    .eval_results, records and samples (present, not edited, of these weights), licence and the base's commit,
    placeholders, local paths, missing pictures. In people's prose a number with a decimal point or % beside the name
    of a metric or task must be one of a record, as rounded as it is written; a sentence that links to its source is
    somebody else's result and left alone.

    \b
    Examples:
      hub-moe card lint my-model
      hub-moe card lint alice/my-moe --json
    """
    from ..cards import lint_card, open_model

    source = open_model(model)
    findings = lint_card(source, records=records or [], compare=_compare)
    if as_json:
        print_json([{"place": finding.place, "problem": finding.problem} for finding in findings])
    else:
        for finding in findings:
            print_text(str(finding))
    if findings:
        say(f"{len(findings)} {'finding' if len(findings) == 1 else 'findings'}.")
        raise typer.Exit(1)
    say("Every number has its record.")


@card.command()
def show(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Show the facts that a card was rendered from.

    \b
    Examples:
      hub-moe card show my-model
      hub-moe card show alice/my-moe --json
    """
    from ..cards import open_model, read_facts
    from ..cards.render import render_blocks

    source = open_model(model)
    facts = read_facts(source.folder)
    if facts is None:
        raise ConfigError(f"{model} has no model_card.json; hub-moe card {model} makes it.")
    if as_json:
        print_json(facts.to_dict())
        return
    for block in render_blocks(facts, "").values():
        print_text("\n".join(block.splitlines()[1:-1]) + "\n")


def _find_evidence(
    source: ModelFolder, folder: Path, *, records: list[Path], run: Path | None, base_record: Path | None
) -> Evidence:
    from ..cards import Evidence, TrainingRun, find_evidence
    from ..cards.collect import RECORDS_FOLDER, is_of
    from ..evals.records import read_record

    beside = folder / RECORDS_FOLDER
    found = find_evidence(source.folder, [*records, *([beside] if beside.is_dir() else [])])
    parent = source.folder.resolve().parent
    if run is None and (parent / "run.toml").is_file() and (parent / "report.json").is_file():
        run = parent
    training: TrainingRun | None = TrainingRun(run) if run else None
    comparison = None
    if base_record is not None:
        base = read_record(base_record)
        same = [each for each in found if is_of(each.record, source.weights) and each.record.suite == base.record.suite]
        if not same:
            raise ConfigError(
                f"{base_record} is of the suite {base.record.suite.name}, of which there is no record of {source.name} "
                "with the same settings; evaluate it first, or name the folder of its records by --records."
            )
        candidate = max(same, key=lambda each: each.record.created)
        comparison = (base, candidate, _compare(base, candidate))
    return Evidence(records=found, run=training, comparison=comparison)


def _compare(base: StoredRecord, candidate: StoredRecord) -> dict[str, Any]:
    from ..evals.compare import compare_records

    return compare_records(base, candidate).to_dict()


def _measure(source: ModelFolder, run: TrainingRun | None) -> dict[str, Any] | None:
    """The footprint of the model, or of the base of a patch or adapter; None where that cannot be had."""
    from ..anatomy import measure_footprint
    from ..cards.collect import find_base
    from .inspect import load_config

    name, revision = str(source.folder), None
    if source.kind != "checkpoint":
        base = find_base(source, run)
        name, revision = (base.name, base.revision) if base else (name, None)
    try:
        footprint = measure_footprint(load_config(name, revision))
    except (HubMoeError, OSError) as error:
        say(f"Sizes are left out: {error}")
        return None
    return footprint.to_dict(context=min(4096, footprint.max_context or 4096))


def _read_old(source: ModelFolder, target: Path) -> Readme:
    """The README to keep. One that `hub_moe` wrote for a patch says what is now said between markers: it gives way."""
    from ..cards import read_readme
    from ..patches.card import render_card, render_merged_card
    from ..patches.metadata import METADATA_FILE, PatchMetadata

    path = target if target.exists() else source.folder / "README.md"
    readme = read_readme(path)
    if (source.folder / METADATA_FILE).is_file():
        metadata = PatchMetadata.read(source.folder)
        if str(readme) in (render_card(metadata), render_merged_card(metadata)):
            return replace(readme, parts=())
    return readme


def _load_profile(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from ..anatomy import ExpertProfile

    return ExpertProfile.load(path).to_dict()


def _draw(facts: Facts, evidence: Evidence, folder: Path) -> tuple[Picture, ...]:
    """Draw what there is to see into `card/`, which the README shows."""
    from ..cards.facts import Picture

    try:
        from ..plots import plot_comparison, plot_expert_heat_map, plot_run
    except MissingExtraError as error:
        say(f"No pictures: {error}")
        return facts.pictures
    name = facts.model.name.replace("$", r"\$")  # no mathematics in titles
    figures: list[tuple[str, Any]] = []
    metrics = evidence.run.metrics if evidence.run else []
    if any(row.get("loss") is not None for row in metrics):
        figures.append(("training", plot_run(metrics, title=f"Training of {name}")))
    if evidence.profile is not None:
        domain, profile = next(iter(evidence.profile["domains"].items()))
        shares = {
            int(layer): [count / max(1, sum(values["tokens"])) for count in values["tokens"]]
            for layer, values in profile["layers"].items()
        }
        figures.append(
            (
                "experts",
                plot_expert_heat_map(
                    shares, title="Load of the experts on " + domain.replace("$", r"\$"), label="share of tokens"
                ),
            )
        )
    if facts.comparison is not None:
        tasks = facts.to_dict()["comparison"]["tasks"]
        figures.append(("comparison", plot_comparison(tasks, title=f"{name} against its base")))
    pictures = []
    for about, figure in figures:
        picture = Picture(f"card/{about}.png", about)  # type: ignore[arg-type]
        (folder / "card").mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / picture.file, format="png")
        pictures.append(picture)
    drawn = {picture.about for picture in pictures}
    kept = [each for each in facts.pictures if each.about not in drawn and (folder / each.file).is_file()]
    return (*kept, *pictures)


def _copy_records(facts: Facts, evidence: Evidence, folder: Path) -> None:
    """Put the records that the card names, and their samples, beside it: a claim without its record is none."""
    import shutil

    from ..cards.collect import RECORDS_FOLDER

    names = {evaluation.file for evaluation in facts.evaluations}
    stored = [each for each in evidence.records if each.path.name in names]
    stored += [evidence.comparison[0]] if evidence.comparison else []
    for each in stored:
        each.read_samples()  # refuses edited ones
        for path in (each.path, each.samples_path):
            target = folder / RECORDS_FOLDER / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or not target.samefile(path):
                shutil.copyfile(path, target)
