"""The whole loop as commands: a base is published, patches are proposed, reviewed, merged, and the result is used."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi

from ..data import Corpus
from ..errors import EvaluationError
from ..modeling import HubMoeConfig, HubMoeForCausalLM
from ..training.processes import choose_num_threads
from .folder import RunFolder
from .local_hub import LocalHub
from .plan import ALICE, BOB, DATASET, MALLORY, MODEL, OWNER, DemoPlan, Domain
from .steps import Done, Steps
from .texts import (
    GENERAL,
    configure_base,
    configure_patch,
    make_domain_rows,
    write_corpus,
    write_reference,
    write_rows,
    write_script,
    write_settings,
    write_suites,
)


@dataclass(frozen=True)
class Proposal:
    """A pull request of the demo: who opened it with which patch, and what it claims to gain, in words."""

    number: int
    author: str
    name: str
    claim: str
    is_honest: bool


@dataclass(frozen=True)
class Reviewed:
    """What the owner's review says of it."""

    proposal: Proposal
    verdict: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


class Loop:
    """The acts of the demo, in this order: `build_base`, `contribute`, `review`, `merge`, `use`."""

    def __init__(self, hub: LocalHub, plan: DemoPlan, folder: RunFolder) -> None:
        self._plan, self._folder = plan, folder
        self.steps = Steps(hub, folder)
        self._api = HfApi(endpoint=hub.hub.url, token=False)

    def write_texts(self, corpus: Corpus) -> None:
        """What lies on people's disks before the first command."""
        folder, plan = self._folder, self._plan
        folder.write_atomically(folder.corpus, lambda path: write_corpus(corpus, path))
        folder.write_atomically(folder.suites, lambda path: write_suites(plan, path))
        folder.write_atomically(folder.reference, write_reference)
        folder.write_atomically(folder.script, lambda path: write_script(plan, path))
        for domain in plan.domains:
            write_rows(folder.rows(domain.name), make_domain_rows(domain, plan, corpus))
        folder.reviews.mkdir(exist_ok=True)

    def build_base(self) -> dict[str, Any]:
        """Publish the text, train the base on it, evaluate and publish that; the report of its training."""
        run, folder = self.steps.run, self._folder
        upload = ["hf", "upload", DATASET, folder.inside(folder.corpus), ".", "--repo-type", "dataset"]
        run("dataset", OWNER, "shares a text, Python's own standard library", upload)
        settings = folder.run_settings("base")
        if not settings.exists():
            revision = str(self._api.dataset_info(DATASET).sha)
            threads = _fastest_threads(self._plan)
            config = configure_base(self._plan, folder, data_revision=revision, num_threads=threads)
            folder.write_atomically(settings, lambda path: write_settings(path, config))
        train = ["hub-moe", "train", folder.inside(settings), "--json"]
        trained = run("base", OWNER, "trains a model of many small experts on it", train)
        suite, model = folder.inside(folder.suite(GENERAL)), folder.inside(folder.base / "model")
        ask = ["hub-moe", "eval", model, "--as", MODEL, "--suite", suite]
        ask += ["--out", folder.inside(folder.evals), "--json"]
        run("base-eval", OWNER, "evaluates it", ask)
        publish = ["hub-moe", "publish", folder.inside(folder.base), MODEL, "--license", "apache-2.0"]
        publish += ["--records", folder.inside(folder.evals), "--yes", "--json"]
        run("publish", OWNER, "publishes it with its card and the evidence", publish)
        report: dict[str, Any] = trained.data
        return report

    def contribute(self) -> list[Proposal]:
        """Two honest patches and a dishonest one, each as a pull request, by their numbers."""
        first, second = self._plan.domains
        proposals = self.steps.run_together(
            lambda: self._propose(ALICE, first),
            lambda: self._propose(BOB, second),
            lambda: self._propose_forged(MALLORY, second),
        )
        return sorted(proposals, key=lambda each: each.number)

    def review(self, proposals: list[Proposal]) -> list[Reviewed]:
        """The owner's reviews.

        Raises:
            EvaluationError: If one comes to another verdict than it should.
        """
        return self.steps.run_together(*(partial(self._review, each) for each in proposals))

    def merge(self, reviews: list[Reviewed]) -> dict[str, Any]:
        """Merge what was accepted; the merge as JSON."""
        accepted = [f"{MODEL}#{each.proposal.number}" for each in reviews if each.verdict == "accept"]
        command = ["hub-moe", "merge", *accepted, "--method", self._plan.method]
        command += ["--tolerance", str(self._plan.tolerance), "--yes", "--json"]
        merged: dict[str, Any] = self.steps.run("merge", OWNER, "merges what was accepted", command).data
        return merged

    def use(self) -> str:
        """What anybody gets who knows the model's name: its text; its claims are checked and its lineage is shown."""
        run, folder = self.steps.run, self._folder
        text = run("use", None, "loads the merged model by its name", ["python", folder.inside(folder.script)]).output
        check = ["hub-moe", "verify", MODEL, "--documents", str(self._plan.reviewed_documents), "--json"]
        run("verify", None, "checks its claims", check)
        lineage = ["hub-moe", "lineage", MODEL, "--plot", folder.inside(folder.lineage)]
        run("lineage", None, "sees who made what of what", lineage)
        run("find", None, "ranks what was made of it by reproduced results", ["hub-moe", "find", "--base", MODEL])
        return text

    def _propose(self, who: str, domain: Domain) -> Proposal:
        folder = self._folder
        self._train(who, domain, domain.steps, f"trains the experts that {domain.about} use most")
        suites = [folder.inside(folder.suite(name)) for name in (domain.name, GENERAL)]
        command = ["hub-moe", "contribute", folder.inside(folder.person(who)), MODEL, "--as", domain.name]
        command += [word for suite in suites for word in ("--evaluate", suite)]
        command += ["--general", GENERAL, "--yes", "--json"]
        done = self.steps.run(f"{who}-pr", who, "evaluates and proposes them to the owner", command)
        return _read_proposal(done, domain, is_honest=True)

    def _propose_forged(self, who: str, domain: Domain) -> Proposal:
        """A patch of one step, and a record in which every answer is right."""
        folder, run = self._folder, self.steps.run
        self._train(who, domain, 1, "trains for one step only")
        patch, evals = folder.person(who) / "patch", folder.person(who) / "patch" / "evals"
        suite, base = folder.inside(folder.suite(domain.name)), f"{MODEL}@{self._base_commit()}"
        ask = ["hub-moe", "eval", folder.inside(patch), "--suite", suite, "--base", base]
        ask += ["--out", folder.inside(evals), "--json"]
        record = run(f"{who}-eval", who, "evaluates that", ask).data["record"]
        path = evals / f"{record['suite']['name']}-{record['id'][:16]}.json"
        forge = ["python", "-m", "hub_moe.demo.forge", folder.inside(path)]
        run(f"{who}-forge", who, "makes every answer right", forge)
        name = f"{domain.name}-pro"
        command = ["hub-moe", "contribute", folder.inside(folder.person(who)), MODEL, "--as", name]
        command += ["--general", GENERAL, "--yes", "--json"]
        return _read_proposal(run(f"{who}-pr", who, "proposes it as the better one", command), domain, is_honest=False)

    def _train(self, who: str, domain: Domain, steps: int, title: str) -> None:
        settings = self._folder.run_settings(who)
        if not settings.exists():
            config = configure_patch(
                self._plan, self._folder, who, domain, base_revision=self._base_commit(), steps=steps
            )
            self._folder.write_atomically(settings, lambda path: write_settings(path, config))
        self.steps.run(f"{who}-train", who, title, ["hub-moe", "train", self._folder.inside(settings), "--json"])

    def _base_commit(self) -> str:
        return str(self.steps["publish"].data["commit"])

    def _review(self, proposal: Proposal) -> Reviewed:
        plan, number = self._plan, proposal.number
        out = self._folder.inside(self._folder.reviews / f"{number}.json")
        command = ["hub-moe", "review", f"{MODEL}#{number}", "--documents", str(plan.reviewed_documents)]
        command += ["--tolerance", str(plan.tolerance), "--out", out]
        title = f"reviews {proposal.name} of {proposal.author}"
        done = self.steps.run(f"review-{number}", OWNER, title, [*command, "--yes", "--json"], expected=(0, 1, 3))
        found = done.data
        if (found["verdict"] == "accept") != proposal.is_honest:
            what = f"the {'honest' if proposal.is_honest else 'forged'} contribution #{number}"
            reasons = "; ".join([*found["rejections"], *found["gaps"]]) or "no reason"
            raise EvaluationError(f"The review of {what} says {found['verdict']}: {reasons}.")
        return Reviewed(proposal, found["verdict"], tuple(found["rejections"]), tuple(found["notes"]))


def _fastest_threads(plan: DemoPlan) -> int:
    """Of torch's threads, for the base; settled once, since another number rounds differently."""
    model = HubMoeForCausalLM(HubMoeConfig.from_preset("nano", vocab_size=plan.vocab_size, **plan.model_changes))
    return choose_num_threads(model, torch.randint(plan.vocab_size, (plan.batch_size, plan.block_length)))


def _read_proposal(done: Done, domain: Domain, *, is_honest: bool) -> Proposal:
    data = done.data
    claimed = next(each for each in data["comparisons"] if each["suite"] == domain.name)
    (task,) = claimed["comparison"]["tasks"]
    claim = f"{claimed['metrics'][task['task']]} {task['base']['value']:.3f} -> {task['candidate']['value']:.3f}"
    return Proposal(data["pull_request"], done.who, data["name"], claim, is_honest)
