"""A Hub where bob proposes an expert patch with records, and people review it."""

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from hub_moe.evals.records import ModelSource, SuiteSource, write_record
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store
from tests.evals.records.examples import make_record, make_samples

BASE = "alice/reef"
WEIGHTS = b"\0weights of the patch"
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CHOSEN = {1: [0, 1, 2, 9, 33], 2: [5, 17, 18, 60], 3: [63], 5: [4, 7, 12, 13, 14, 15, 40], 6: [22, 31], 7: [3]}
PARTS = ("gate_proj", "up_proj", "down_proj")
NASTY = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


def make_metadata(chosen=None, **changes):
    """`expert_patch.json`; the last expert of each layer has one of its three tensors only."""
    tensors = {}
    for layer, experts in (chosen or CHOSEN).items():
        for expert in experts:
            parts = PARTS[:1] if expert == experts[-1] and len(experts) > 1 else PARTS
            tensors |= {f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight": {} for part in parts}
    fields = {
        "format_version": 1,
        "base": {"repo": BASE, "commit": "c" * 40, "model_type": "hub_moe"},
        "experts": {str(layer): list(experts) for layer, experts in (chosen or CHOSEN).items()},
        "training": {"method": "esft"},
        "tensors": tensors,
    }
    return json.dumps(fields | changes)


def make_records(folder, scores, *, is_patch, suite="cooking"):
    """The files of a record with these scores: its id and texts by name."""
    value = sum(scores) / len(scores)
    model = ModelSource("reef", "checkpoint", repo=BASE, files={"model.safetensors": "5" * 64})
    if is_patch:
        model = ModelSource("cook", "expert_patch", files={"expert_patch.safetensors": WEIGHTS_SHA256}, base=model)
    record = make_record(model=model, suite=SuiteSource(suite, hashlib.sha256(suite.encode()).hexdigest()))
    (entry,) = record.entries
    metric = replace(entry.metrics[0], value=value, low=value - 0.1, high=value + 0.1, num_documents=len(scores))
    stored = write_record(folder, replace(record, entries=(replace(entry, metrics=(metric,)),)), make_samples(scores))
    return stored.record.id, {path.name: path.read_bytes() for path in (stored.path, stored.samples_path)}


def make_files(name="cook", *, before=(1, 0, 1, 0), after=(1, 1, 1, 0), **changes):
    """A patch's folder as it is contributed, and the ids of its record and the base's."""
    with tempfile.TemporaryDirectory() as folder:
        patch_id, ours = make_records(Path(folder) / "a", [float(one) for one in after], is_patch=True)
        base_id, theirs = make_records(Path(folder) / "b", [float(one) for one in before], is_patch=False)
    one, other = sum(before) / len(before), sum(after) / len(after)
    task = {"task": "cloze", "base": one, "candidate": other, "difference": other - one}
    task |= {"low": other - one - 0.2, "high": other - one + 0.2, "verdict": "better"}
    comparison = {"base_record_sha256": base_id, "record_sha256": patch_id, "tasks": [task]}
    files = {
        "expert_patch.json": make_metadata(),
        "expert_patch.safetensors": WEIGHTS,
        "model_card.json": json.dumps({"comparison": comparison}),
        **{f"evals/{path}": content for path, content in (ours | theirs).items()},
        **changes,
    }
    return {f"patches/{name}/{path}": content for path, content in files.items() if content is not None}, patch_id


def commit(api, files, *, message="Add an expert patch", description="It cooks.", pr=True, repo=BASE):
    operations = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else content.encode())
        for path, content in files.items()
    ]
    return api.create_commit(repo, operations, commit_message=message, commit_description=description, create_pr=pr)


def write_review(head, verdict="accept", **fields):
    """The text of a comment with a review."""
    mark = {"format_version": 1, "commit": head, "verdict": verdict, "reasons": [], "records": {}, "nonce": "1"}
    return f"I looked at it.\n\n<!-- hub_moe:review {json.dumps(mark | {'regressions': []} | fields)} -->"


class PatchTown:
    """`alice` owns the base; `bob` and `carol` do not."""

    def __init__(self, root):
        self.hub = create_hub(root)
        with Store(self.hub.root) as store:
            store.accounts.add_user("carol")
            self.hub.tokens["carol"] = store.accounts.create_token("carol")

    @property
    def url(self):
        return self.hub.url

    def found(self):
        """Make the base; the Hub must be running."""
        self.alice, self.bob, self.carol = (
            HfApi(endpoint=self.url, token=self.hub.tokens[user]) for user in ("alice", "bob", "carol")
        )
        self.alice.create_repo(BASE)
        card = "---\nlicense: mit\n---\n# reef\n\nA small base.\n"
        config = json.dumps({"model_type": "hub_moe", "n_routed_experts": 64})
        commit(self.alice, {"README.md": card, "config.json": config}, pr=False)

    def propose(self, files, **options):
        """A pull request of bob's: its number and head."""
        made = commit(self.bob, files, **options)
        return made.pr_num, self.head(made.pr_num)

    def head(self, number):
        return self.bob.model_info(BASE, revision=f"refs/pr/{number}").sha

    def show(self, visitor, number):
        answer = visitor.get(f"/{BASE}/discussions/{number}")
        assert answer.status_code == 200
        return answer.text
