"""The commits of a revision, and what one commit changed."""

from itertools import islice

from starlette.responses import Response

from ..calls import Call
from ..store.diffs import diff_commits
from .diffs import lay_out
from .files import read_refs
from .repo import repo_routes, show_repo_page

_PER_PAGE = 50


def show_history(call: Call) -> Response:
    """`GET /{id}/commits/{rev}`."""
    repo, revision = call.repo_to_read(), call.param("rev")
    page = max(1, call.number("p", 1, most=10**5))
    with call.store.repos.open(repo) as git:
        start = (page - 1) * _PER_PAGE
        entries = list(islice(git.log(git.resolve(revision)), start, start + _PER_PAGE + 1))
        refs = read_refs(git)
    return show_repo_page(
        call,
        repo,
        "commits.html",
        tab="history",
        revision=revision,
        path="",
        entries=entries[:_PER_PAGE],
        has_more=len(entries) > _PER_PAGE,
        page=page,
        refs=refs,
        view="commits",
    )


def show_commit(call: Call) -> Response:
    """`GET /{id}/commit/{sha}`: its message, and the difference to the commit it was made on."""
    repo = call.repo_to_read()
    with call.store.repos.open(repo) as git:
        commit = git.resolve(call.param("rev"))
        entry, parents = next(iter(git.log(commit))), git.parents(commit)
        diff = lay_out(call.store, git, diff_commits(git, parents[0] if parents else None, commit))
    title, _, rest = entry.message.partition("\n")
    return show_repo_page(
        call,
        repo,
        "commit.html",
        tab="history",
        entry=entry,
        title=title,
        message=rest.strip(),
        parents=parents,
        diff=diff,
        revision=commit,
    )


ROUTES = [*repo_routes("/commits/{rev}", show_history), *repo_routes("/commit/{rev}", show_commit)]
