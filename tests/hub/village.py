"""A Hub with a base, what it was made from, what was made of it, a merge and open contributions."""

import json
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi

from hub_moe.hub.marks import ContributionMark, ReviewMark, write_mark
from hub_moe.patches import Base
from tests.patches.patching import build_model, patch_experts

SHA = "ab" * 32


@dataclass
class Village:
    """`base` is a repo of alice's; `head` the head of bob's open contribution, number `number`."""

    url: str
    alice: HfApi
    bob: HfApi
    base: str
    first_commit: str
    number: int = 0
    head: str = ""

    def add_model(self, api, name, *, bases=(), relation=None, tags=(), files=()):
        """A model repo with a card; returns the commit."""
        card = {"base_model": list(bases), "base_model_relation": relation, "tags": list(tags)}
        lines = [f"{key}: {json.dumps(value)}" for key, value in card.items() if value]
        api.create_repo(name)
        readme = "\n".join(["---", *(lines or ["license: mit"]), "---", f"# {name}"])
        return commit(api, name, {"README.md": readme, **dict(files)}).oid

    def propose(self, name, files, *, api=None, mark=None):
        """A pull request of bob's with a patch; returns its number."""
        mark = mark or ContributionMark(name, SHA, self.first_commit, ["1" * 64])
        return commit(
            api or self.bob,
            self.base,
            files,
            message=f"Add {name}",
            description=f"Better.\n\n{write_mark(mark)}",
            pr=True,
        ).pr_num

    def review(self, api, number, verdict, *, head=None, **facts):
        """A comment that ends with a review."""
        head = head or self.bob.repo_info(self.base, revision=f"refs/pr/{number}").sha
        api.comment_discussion(self.base, number, f"I looked.\n\n{write_mark(ReviewMark(head, verdict, **facts))}")


def commit(api, repo, files, *, message="Change files", description=None, pr=False):
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    return api.create_commit(repo, operations, commit_message=message, commit_description=description, create_pr=pr)


def make_patch_json(base, base_commit):
    """The metadata of a patch of three experts in two layers."""
    return (
        patch_experts(
            build_model(), {1: [0, 7], 2: [3]}, base=Base(base, base_commit, "hub_moe"), training={"method": "experts"}
        )
        .metadata.to_json()
        .replace('"sha256": null', f'"sha256": "{SHA}"')
    )


def build_village(hub, prefix):
    """Repos of alice and bob whose names begin with `prefix`."""
    alice, bob = (HfApi(endpoint=hub.url, token=hub.tokens[user]) for user in ("alice", "bob"))
    village = Village(hub.url, alice, bob, f"alice/{prefix}-base", "")
    village.add_model(alice, f"alice/{prefix}-root", bases=["gone/forever"])
    village.first_commit = village.add_model(alice, village.base, bases=[f"alice/{prefix}-root"])
    metadata = make_patch_json(village.base, village.first_commit)
    tune = f"bob/{prefix}-tune"
    village.add_model(bob, tune, bases=[village.base])
    village.add_model(bob, f"bob/{prefix}-lora", bases=[tune], relation="adapter")
    village.add_model(
        bob,
        f"bob/{prefix}-own-patch",
        bases=[village.base],
        tags=["expert-patch"],
        files={"expert_patch.json": metadata},
    )
    trailers = (
        f"Merged-Patch: law weights_sha256={SHA}\nPull-Request: #7\nContributor: bob\n"
        f"Base-Commit: {village.first_commit}\nMerge-Method: exact"
    )
    law = {"patches/law/expert_patch.json": metadata, "patches/broken/expert_patch.json": "{"}
    commit(alice, village.base, law, message="Merge law", description=f"Tested on both suites.\n\n{trailers}")
    village.number = village.propose("intent", {"patches/intent/expert_patch.json": metadata})
    village.head = bob.repo_info(village.base, revision=f"refs/pr/{village.number}").sha
    village.review(alice, village.number, "accept")
    village.review(bob, village.number, "reject", head="0" * 40)
    return village
