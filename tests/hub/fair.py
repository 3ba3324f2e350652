"""A Hub with a base and fine-tunes of it that show off records, honest and other ones."""

import hashlib
import json
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from hub_moe.evals.records import EntryResult, Metric, ModelSource, Sample, TaskSource, write_record
from hub_moe.hub.marks import ContributionMark, ReviewMark, write_mark
from tests.evals.records.examples import make_record

from .village import make_patch_json

BEFORE = (1, 0, 1, 0, 1, 0, 1, 0)  # right and wrong answers of the base to eight documents
BETTER = (1, 1, 1, 0, 1, 1, 1, 0)
BEST = (1, 1, 1, 1, 1, 1, 1, 1)
METRICS = {"cloze": ("acc", True), "prose": ("bits_per_byte", False)}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_source(weights, *, base=None, name="expert_patch.safetensors", kind="expert_patch"):
    """What a record says of the model whose file of weights this is."""
    return ModelSource("some", kind, files={name: sha256(weights)}, base=base)


def make_entry(task, scores, *, claimed=None):
    """The result of a task, with a value that may be another one than the scores give."""
    metric, higher_is_better = METRICS[task]
    source = make_record().entries[0].tasks[0]
    asked = TaskSource(**{**vars(source), "name": task, "num_documents": len(scores)})
    value = sum(scores) / len(scores) if claimed is None else claimed
    return EntryResult(task, (asked,), (Metric(metric, value, higher_is_better, len(scores)),), main_metric=metric)


def make_sample(task, index, score):
    return Sample(
        entry=task,
        task=task,
        index=index,
        document_sha256=f"{index:064x}",
        prompt_sha256s=(f"{index:064x}",),
        log_likelihoods=(-1.0,),
        is_greedy=(True,),
        scores={METRICS[task][0]: float(score)},
    )


def make_evidence(source, *, claimed=None, with_table=True, change=lambda record: record, **tasks):
    """A record and its table as files in `evals/`, and the record's id; tasks with their scores by document."""
    entries = tuple(make_entry(task, scores, claimed=claimed) for task, scores in tasks.items())
    samples = [make_sample(task, i, score) for task, scores in tasks.items() for i, score in enumerate(scores)]
    with tempfile.TemporaryDirectory() as folder:
        record = change(replace(make_record(), model=source, entries=entries))
        stored = write_record(Path(folder), record, samples)
        paths = [stored.path, *([stored.samples_path] if with_table else [])]
        return stored.record.id, {f"evals/{path.name}": path.read_bytes() for path in paths}


@dataclass
class Fair:
    """`repo` is alice's base; `evidence` the id and the files of its record."""

    alice: HfApi
    bob: HfApi
    repo: str
    commit: str = ""
    source: ModelSource | None = None
    evidence: tuple[str, dict[str, bytes]] = ("", {})
    _patch_json: dict = field(default_factory=dict)

    def found(self, *, with_record=True, **scores):
        """Make the base."""
        weights = f"weights of {self.repo}".encode()
        self.source = make_source(weights, name="model.safetensors", kind="checkpoint")
        self.evidence = make_evidence(self.source, **(scores or {"cloze": BEFORE}))
        self.alice.create_repo(self.repo)
        files = {"README.md": b"---\nlicense: mit\n---\n# Base\n", "model.safetensors": weights}
        self.commit = commit(self.alice, self.repo, files | (self.evidence[1] if with_record else {})).oid
        self._patch_json = json.loads(make_patch_json(self.repo, self.commit))
        return self

    def make_patch(self, name, *, claimed=None, change=lambda record: record, extra=None, **tasks):
        """The weights of a patch, its record's id, and the files of its folder."""
        weights = f"weights of {name}".encode()
        record, evidence = make_evidence(
            make_source(weights, base=self.source), claimed=claimed, change=change, **(tasks or {"cloze": BETTER})
        )
        metadata = self._patch_json | {"weights": self._patch_json["weights"] | {"sha256": sha256(weights)}}
        files = {"expert_patch.json": json.dumps(metadata).encode(), "expert_patch.safetensors": weights}
        return weights, record, files | evidence | (extra or {})

    def propose(self, name, *, api=None, **options):
        """A pull request of bob's with a patch; its number and its record's id."""
        weights, record, files = self.make_patch(name, **options)
        mark = ContributionMark(name, sha256(weights), self.commit, [record])
        made = commit(
            api or self.bob,
            self.repo,
            {f"patches/{name}/{path}": content for path, content in files.items()},
            description=f"It helps.\n\n{write_mark(mark)}",
            pr=True,
        )
        return made.pr_num, record

    def review(self, number, records, *, verdict="accept", outcome="bit-equal", api=None, reasons=()):
        """A comment of alice's on the head that ends with a review of these records."""
        head = self.alice.repo_info(self.repo, revision=f"refs/pr/{number}").sha
        mark = ReviewMark(head, verdict, list(reasons), dict.fromkeys(records, outcome))
        (api or self.alice).comment_discussion(self.repo, number, f"I looked.\n\n{write_mark(mark)}")

    def add_model(self, name, *, claimed=None, relation=None, api=None, extra=None, **tasks):
        """A whole model of bob's whose card names the base."""
        weights = f"weights of {name}".encode()
        api = api or self.bob
        api.create_repo(name)
        card = f"---\nbase_model: {self.repo}\n{f'base_model_relation: {relation}' if relation else ''}\n---\n# It\n"
        files = {"README.md": card.encode(), "model.safetensors": weights}
        if tasks:
            source = make_source(weights, name="model.safetensors", kind="checkpoint")
            files |= make_evidence(source, claimed=claimed, **tasks)[1]
        return commit(api, name, files | (extra or {})).oid

    def merge(self, number, name, *, method="exact"):
        """What `hub-moe merge` leaves: the patch's folder without its weights, and the trailers."""
        weights, _, files = self.make_patch(name)
        files.pop("expert_patch.safetensors")
        trailers = (
            f"Merged-Patch: {name} weights_sha256={sha256(weights)}\nPull-Request: #{number}\nContributor: bob\n"
            f"Base-Commit: {self.commit}\nMerge-Method: {method}"
        )
        files = {f"patches/{name}/{path}": content for path, content in files.items()}
        files["model.safetensors"] = f"merged weights of {name}".encode()
        commit(self.alice, self.repo, files, message=f"Merge {name}", description=trailers)
        self.alice.change_discussion_status(self.repo, number, "closed")


def build_fair(hub, name):
    """A base `alice/NAME` with nothing made of it yet."""
    alice, bob = (HfApi(endpoint=hub.url, token=hub.tokens[user]) for user in ("alice", "bob"))
    return Fair(alice, bob, f"alice/{name}")


def commit(api, repo, files, *, message="Change files", description=None, pr=False):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, operations, commit_message=message, commit_description=description, create_pr=pr)
