"""The leaderboard of a benchmark: the scores that public models without a gate report for its tasks."""

from typing import Any

from starlette.responses import JSONResponse, Response

from .calls import Call, route
from .evaluations import Score, read_scores
from .profiles import Profile, read_main, read_mains
from .store import Repo
from .store.errors import NotFoundError


def show_leaderboard(call: Call) -> Response:
    """`GET /api/datasets/{id}/leaderboard[?base_model=false][&task_id=…]`.

    Rank 1 has the highest value. A benchmark with several tasks has one ranking for each, one after another, and each
    entry says its `taskId`. Unless `base_model=false`, models that are made from another one are left out.
    """
    repo = call.repo_to_read()
    tasks = read_main(call.store, repo).benchmark_tasks
    if not tasks:
        raise NotFoundError("leaderboard", f"The dataset {repo.id} is not a benchmark: it has no valid eval.yaml.")
    query = call.request.query_params
    wanted = [task for task in tasks if query.get("task_id") in {None, task}]
    best = _find_best(call, str(repo.id), with_derived=query.get("base_model", "").lower() in {"false", "0"})
    rows = []
    for task in wanted:
        found = [(repo, score) for (_, task_id), (repo, score) in best.items() if task_id == task]
        found.sort(key=lambda one: (-one[1].data["value"], str(one[0].id)))
        rows += [_describe(call, rank, *one) for rank, one in enumerate(found, start=1)]
    return JSONResponse(rows)


def _find_best(call: Call, dataset: str, *, with_derived: bool) -> dict[tuple[str, str], tuple[Repo, Score]]:
    """By model and task, the score that counts: the best merged one, or without any the best that is proposed."""
    best: dict[tuple[str, str], tuple[Repo, Score]] = {}
    public = [repo for repo in call.store.repos.visible("model", None) if not repo.gated]  # the same for everybody
    for profile in read_mains(call.store, public):
        repo = profile.repo
        for score in _read(call, profile) if with_derived or not profile.bases[1] else ():
            if score.error or score.data["dataset"]["id"].lower() != dataset.lower():
                continue
            key = (repo.uid, score.data["dataset"]["task_id"])
            if key not in best or _weight(score) > _weight(best[key][1]):
                best[key] = (repo, score)
    return best


def _read(call: Call, profile: Profile) -> list[Score]:
    try:
        return read_scores(call.store, profile.repo)
    except NotFoundError:  # deleted in the meantime
        return []


def _weight(score: Score) -> tuple[bool, float]:
    return score.pull_request is None, score.data["value"]


def _describe(call: Call, rank: int, repo: Repo, score: Score) -> dict[str, Any]:
    owner, source = call.store.accounts.find(repo.id.owner), score.data.get("source")
    row: dict[str, Any] = {
        "rank": rank,
        "modelId": str(repo.id),
        "value": score.data["value"],
        "filename": score.path,
        "verified": False,
        "source": {"isExternal": not source["url"].startswith(call.base_url), **source} if source else None,
        "author": {"name": owner["name"], "fullname": owner["fullname"], "avatarUrl": "", "type": owner["kind"]},
        "taskId": score.data["dataset"]["task_id"],
    }
    if score.pull_request is not None:
        row["pullRequest"] = score.pull_request
    return row | ({"notes": score.data["notes"]} if score.data.get("notes") else {})


ROUTES = [route("/api/{kinds:dataset_kind}/{owner}/{name}/leaderboard", show_leaderboard)]
