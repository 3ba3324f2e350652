"""A base on a Hub with its record, and contributions to it as people would propose them."""

import json
import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.run import RunFacts, evaluate_suite
from hub_moe.evals.suites import load_suite
from hub_moe.evals.tasks import build_suite
from hub_moe.hub.marks import ContributionMark, ReviewMark, write_mark
from hub_moe.hub.pull_requests import fetch_pull_request
from hub_moe.patches import Base
from hub_moe.patches.metadata import PatchMetadata
from tests.anatomy.families import tiny_config
from tests.evals.checkpoints import evaluate, save_model
from tests.patches.patching import patch_experts

CARD = b"---\nlicense: mit\n---\n# Base\n\nWords.\n"
EXPERTS = {"law": {1: [0, 3]}, "tax": {1: [1], 2: [2]}, "rival": {1: [3, 5]}}
SPOILING = {1: list(range(8)), 2: list(range(8))}
FEW = {"tasks": ("brackets", "copying"), "limit": 4}


class World:
    """A Hub on which alice owns models and bob proposes patches; folders lie below `root`."""

    def __init__(self, hub, root):
        self.root = root
        self.alice = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
        self.bob = HfApi(endpoint=hub.url, token=hub.tokens["bob"])

    def publish_base(self, name, config, tokenizer, *, prepare=None):
        """A tiny model with the record of its answers; returns the repo and its commit.

        `prepare` is given the folder and may put its own evidence there, in place of that record.
        """
        folder = save_model(self.root / name, config, tokenizer)
        if prepare is None:
            evaluate(folder, folder / "evals", **FEW)
        else:
            prepare(folder)
        repo = f"alice/{name}"
        self.alice.create_repo(repo)
        self.alice.upload_file(path_or_fileobj=CARD, path_in_repo="README.md", repo_id=repo)
        return repo, self.alice.upload_folder(repo_id=repo, folder_path=folder).oid

    def make_patch(self, repo, commit, name, experts, *, size=0.3, seed=1, with_records=True):
        """The folder `patches/NAME` of a contribution, with records of patch and base."""
        base = snapshot_download(repo, revision=commit)
        model = AutoModelForCausalLM.from_pretrained(base)
        patch = patch_experts(model, experts, base=Base(repo, commit, "hub_moe"), size=size, seed=seed)
        folder = self.root / f"{repo.split('/')[1]}-{name}"
        patch.save(folder)
        if with_records:
            evaluate(folder, folder / "evals", **FEW)
            evaluate(base, folder / "evals", **FEW)
        return folder

    def propose(self, repo, folder, name, *, extra=None, api=None, mark_of=None):
        """Open a pull request with the folder as `patches/NAME`, and more files by their paths; returns its number.

        `mark_of` is the folder that the description speaks of.
        """
        operations = [
            CommitOperationAdd(f"patches/{name}/{path.relative_to(folder).as_posix()}", path)
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        ]
        operations += [CommitOperationAdd(path, data) for path, data in (extra or {}).items()]
        metadata = PatchMetadata.read(mark_of or folder)
        mark = ContributionMark(name, metadata.weights_sha256, metadata.base.commit)
        info = (api or self.bob).create_commit(
            repo,
            operations,
            commit_message=f"Patch {name}",
            commit_description=f"It helps.\n\n{write_mark(mark)}",
            create_pr=True,
        )
        return info.pr_num


class Repo:
    """A base on the Hub and patches for its first commit, small enough to cost nobody a gain."""

    def __init__(self, world, name, tokenizer, *, prepare=None):
        self.world, self.api = world, world.alice
        self.name, self.commit = world.publish_base(name, tiny_config("hub_moe"), tokenizer, prepare=prepare)

    def propose(self, name, *, accepted=True, experts=None, seed=1, with_records=True, size=0.001):
        """The number of a pull request whose head alice accepts."""
        chosen = experts or EXPERTS[name]
        folder = self.world.make_patch(
            self.name, self.commit, name, chosen, size=size, seed=seed, with_records=with_records
        )
        number = self.world.propose(self.name, folder, name)
        if accepted:
            self.accept(number)
        return number

    def accept(self, number, *, verdict="accept", by=None):
        head = fetch_pull_request(self.api, self.name, number).head
        mark = ReviewMark(head, verdict, [] if verdict == "accept" else ["it is bad"])
        (by or self.api).comment_discussion(self.name, number, f"Looked at.\n\n{write_mark(mark)}")

    def weights(self, revision):
        return load_file(hf_hub_download(self.name, "model.safetensors", revision=revision))

    def head(self):
        return self.api.repo_info(self.name).sha

    def status(self, number):
        return fetch_pull_request(self.api, self.name, number).status


def fill_with_text(folder):
    """The record of a suite that needs a folder of data, which is `data` beside the base's."""
    (folder.parent / "data" / "text").mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": f"Line {n} of a text about {n * n} things."}) for n in range(12)]
    (folder.parent / "data" / "text" / "test.jsonl").write_text("\n".join(rows), "utf-8")
    loaded = load_model(ModelRequest(str(folder), batch_size=4))
    built = build_suite(load_suite("text"), tokenizer=loaded.tokenizer, data_dir=folder.parent / "data")
    evaluate_suite(loaded, built, folder / "evals", RunFacts(["test"]))


def fill_spoilable(folder, tokenizer):
    """Likewise, of another model, which the experts `SPOILING` make about 1 % worse by size 3 and seed 1."""
    fill_with_text(save_model(folder, tiny_config("hub_moe"), tokenizer, seed=8))


def copy(folder, target):
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folder, target))
