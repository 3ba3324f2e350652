"""`hub-moe verify`: check the numbers of somebody else's model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EvaluationError
from .output import print_json, print_text, say

if TYPE_CHECKING:
    from ..evals.verify import Verification


def verify(  # noqa: PLR0913 (a parameter is a flag)
    claim: Annotated[
        str, typer.Argument(metavar="CLAIM", help="OWNER/NAME, the pull request OWNER/NAME#N, a folder, or a record.")
    ],
    record: Annotated[str | None, typer.Option(metavar="NAME", help="Only the record whose name begins so.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of OWNER/NAME.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Only records of the patch there, such as patches/law.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="The model, where CLAIM is a record.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base of a patch, if it is not where that says.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="As for the evaluation: files in place of datasets.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="How many to ask again; 59 find 5 % of fabrication.")] = 59,
    nonce: Annotated[str | None, typer.Option(help="Chooses the documents.", show_default="drawn now")] = None,
    suite_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with the tasks of the author's own suite; may run code.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0.", show_default="a GPU if there is one")] = None,
    attention: Annotated[str | None, typer.Option(help="Where the record's cannot run here, such as sdpa.")] = None,
    experts: Annotated[str | None, typer.Option(help="Likewise, such as grouped_mm.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies beside the weights.")
    ] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let suites that need it run code that the model wrote, here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check the records of a model without trusting whoever made them.

    Record and answers must have the hashes they claim, the model the files, the suite the prompts, built again here.
    The numbers are computed again from the answers, and some documents, which the author could not foresee, are asked
    again. Verdicts on these: bit-equal, within tolerance (rounding of another machine), not replayed, failed (exit
    code 1). Below each stands what it does not vouch for.

    \b
    Examples:
      hub-moe verify alice/law-experts
      hub-moe verify alice/base#3 --documents 299          # finds 1 % of fabrication with 95 %
      hub-moe verify evals/offline-0a1b2c3d4e5f6071.json --model runs/demo/base/model
    """
    from ..evals.claims import find_claims
    from ..evals.verify import Reviewer, verify_record

    claims = [
        each
        for each in find_claims(claim, revision=revision, subfolder=subfolder, say=say)
        if record is None or each.path.name.startswith(record)
    ]
    if not claims:
        raise EvaluationError(f"{claim} has no record whose name begins with {record}.")
    found = {}
    for each in claims:
        say(f"Checking {_plain(each.path.name)}")
        reviewer = Reviewer(
            model=model or each.model,
            revision=each.revision if each.model and not model else revision,
            subfolder=each.subfolder if each.model and not model else subfolder,
            base=base,
            data_dir=data_dir,
            num_documents=documents,
            nonce=nonce,
            suite_dir=suite_dir,
            device=device,
            attention=attention,
            experts=experts,
            run_code=run_code,
            trust_remote_code=trust_remote_code,
        )
        found[each.path.name] = verify_record(each.path, reviewer, say=say)
    if as_json:
        print_json({name: verification.to_dict() for name, verification in found.items()})
    else:
        for name, verification in found.items():
            _print(name, verification)
    if any(verification.outcome == "failed" for verification in found.values()):
        raise typer.Exit(1)


def _print(name: str, verification: "Verification") -> None:
    lines = [f"{name}: {verification.outcome}"]
    for finding in verification.findings:
        lines.append(f"  {'ok' if finding.passed else 'FAILED':6}  {finding.check}: {finding.detail}")
    lines += [f"          {document}" for document in verification.failed_documents]
    if verification.catch_probabilities:
        chances = ", ".join(f"{share}: {chance:.0%}" for share, chance in verification.catch_probabilities.items())
        lines.append(
            f"  Had a share of all documents been fabricated, the {verification.num_replayed} asked again would"
        )
        lines.append(f"  have met one with probability {chances}. Nonce {verification.nonce}.")
    lines += [f"  Note: {each}" for each in verification.reservations]
    for line in lines:
        print_text(_plain(line))


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor: records are strangers', and could paint over a verdict."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
