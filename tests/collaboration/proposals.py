"""A base on a Hub with its record, and contributions to it as people would propose them."""

import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from transformers import AutoModelForCausalLM

from hub_moe.hub.marks import ContributionMark, write_mark
from hub_moe.patches import Base
from hub_moe.patches.metadata import PatchMetadata
from tests.evals.checkpoints import evaluate, save_model
from tests.patches.patching import patch_experts

CARD = b"---\nlicense: mit\n---\n# Base\n\nWords.\n"
FEW = {"tasks": ("brackets", "copying"), "limit": 4}


class World:
    """A Hub on which alice owns models and bob proposes patches; folders lie below `root`."""

    def __init__(self, hub, root):
        self.root = root
        self.alice = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
        self.bob = HfApi(endpoint=hub.url, token=hub.tokens["bob"])

    def publish_base(self, name, config, tokenizer):
        """A tiny model with the record of its answers; returns the repo and its commit."""
        folder = save_model(self.root / name, config, tokenizer)
        evaluate(folder, folder / "evals", **FEW)
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


def copy(folder, target):
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folder, target))
