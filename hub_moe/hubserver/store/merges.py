"""What a pull request changes, whether it still fits, and merging it: file by file, by git id, never by content."""

from .accounts import Identity
from .commits import Commits, format_author
from .diffs import diff_commits
from .discussions import Discussion, Discussions, require_open
from .errors import ConflictError
from .git import EXECUTABLE_MODE, FILE_MODE, GitRepo
from .repos import Repo, Repos

_MAX_DIFF_CHARACTERS = 2_000_000


class Merges:
    """Merges pull requests and says what they would do."""

    def __init__(self, repos: Repos, commits: Commits, discussions: Discussions) -> None:
        self._repos = repos
        self._commits = commits
        self._discussions = discussions

    def merge(self, repo: Repo, discussion: Discussion, who: Identity) -> str:
        """Merge an open pull request into its target; the merge commit's id.

        Raises:
            ConflictError: If both sides changed the same file differently; the message names the files.
            InvalidInputError: If it is a draft, closed or merged already.
        """
        with self._commits.changing(repo) as git:
            discussion = self._discussions.find(repo, discussion.num)
            require_open(discussion)
            target, head = git.resolve(discussion.target), git.resolve(discussion.ref)
            base = git.find_merge_base(target, head)
            # when they are the same, an earlier merge was cut short after it had moved the target
            commit = target if base == head else _write_merge(git, base, target, head, who, discussion)
            git.objects.flush()
            with self._discussions.merging(repo, discussion, who, commit):
                if commit != target:
                    git.move_ref(discussion.target, old=target, new=commit)
        self._repos.touch(repo)
        return commit


def find_conflicts(git: GitRepo, discussion: Discussion) -> list[str]:
    """The files that a pull request and its target changed differently since they parted."""
    target, head = git.resolve(discussion.target), git.resolve(discussion.ref)
    return _conflicts(git, git.find_merge_base(target, head), target, head)


def render_diff(git: GitRepo, discussion: Discussion) -> str:
    """What a pull request changes, as a unified diff; large files as their pointers, long ones only named."""
    parts: list[str] = []
    size = 0
    for change in diff_commits(git, *find_range(git, discussion)):
        size += len(change.text)
        if size > _MAX_DIFF_CHARACTERS:
            parts.append("... the rest of the diff is too long to show\n")
            break
        parts.append(change.text)
    return "".join(parts)


def find_range(git: GitRepo, discussion: Discussion) -> tuple[str | None, str]:
    """The commits between which a pull request's changes lie: where it left its target, and its head."""
    head = git.resolve(discussion.ref)
    start = _find_start(git, discussion.merge_commit, head) or git.resolve(discussion.target)
    return git.find_merge_base(start, head), head


def _find_start(git: GitRepo, merge_commit: str | None, head: str) -> str | None:
    """What the target was before a merge; None before it, and where an older `hub gc` has deleted the merge commit."""
    if merge_commit is None or merge_commit not in git.objects:
        return None
    parents = git.parents(merge_commit)
    return (
        parents[0] if head in parents[1:] else merge_commit
    )  # an empty pull request is merged by no commit of its own


def _write_merge(git: GitRepo, base: str | None, target: str, head: str, who: Identity, discussion: Discussion) -> str:
    conflicts = _conflicts(git, base, target, head)
    if conflicts:
        raise ConflictError(f"Both sides changed {', '.join(conflicts[:10])}; update the pull request first.")
    changes = {path: new for path, (_, new) in git.compare(base, head).items()}
    removed = {path: None for path, new in changes.items() if new is None and git.find_entry(target, path)}
    tree: str | None = git.tree_of(target)
    tree = git.write_tree(tree, removed) if removed else tree
    added = {path: new for path, new in changes.items() if new}
    modes = _changed_modes(git, base, head)
    added |= {path: entry.oid for path in modes if path not in changes and (entry := git.find_entry(target, path))}
    tree = git.write_tree(tree, added, modes=modes) if added else tree
    message = f"{discussion.title} (#{discussion.num})"
    return git.write_commit(tree=tree, parents=[target, head], author=format_author(who), message=message)


def _changed_modes(git: GitRepo, base: str | None, head: str) -> dict[str, int]:
    before, after = git.executables(base), git.executables(head)
    return {path: EXECUTABLE_MODE if path in after else FILE_MODE for path in before ^ after}


def _conflicts(git: GitRepo, base: str | None, target: str, head: str) -> list[str]:
    ours = git.compare(base, target)
    return [path for path, (_, new) in git.compare(base, head).items() if path in ours and ours[path][1] != new]
