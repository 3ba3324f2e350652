"""Of a gated repo everybody may know its name and what is on `main`, and only who was let in what else it holds."""

import pytest

from .client_over_http import Client

RESULTS = "- dataset:\n    id: alice/gate-bench\n    task_id: t1\n  value: 77\n  notes: SECRET\n"
REPO = "/api/models/alice/gated"


@pytest.fixture(scope="module")
def alice(hub):
    with Client(hub) as client:
        client.create("gate-bench", type="dataset")
        header = {"summary": "m"}
        body = '{"key": "header", "value": {"summary": "m"}}\n' + (
            '{"key": "file", "value": {"path": "eval.yaml", "content": "name: b\\ntasks:\\n- id: t1\\n"}}'
        )
        client.send("POST", "/api/datasets/alice/gate-bench/commit/main", content=body).raise_for_status()
        client.create("gated")
        client.commit(
            "gated", {"README.md": b"---\nlicense: mit\n---\nold SECRET", ".eval_results/a.yaml": RESULTS.encode()}
        )
        client.commit("gated", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        client.commit("gated", {"README.md": b"---\nlicense: SECRET\n---\n"}, header=header, create_pr=1)
        client.send("PUT", f"{REPO}/settings", json={"gated": "manual"}).raise_for_status()
        yield client


@pytest.fixture(params=[None, "bob"])
def stranger(hub, request):
    with Client(hub, request.param) as client:
        yield client


def test_scores_show_only_to_who_may_read_them(alice, stranger):
    assert "SECRET" in alice.send("GET", f"{REPO}?expand=evalResults").text
    for path in (f"{REPO}?expand=evalResults", "/api/models?expand=evalResults&author=alice&search=gated"):
        answer = stranger.send("GET", path)
        assert (answer.status_code, "SECRET" in answer.text) == (200, False)
    assert stranger.send("GET", "/api/datasets/alice/gate-bench/leaderboard").json() == []
    alice.send("PUT", f"{REPO}/settings", json={"gated": False}).raise_for_status()
    assert stranger.send("GET", "/api/datasets/alice/gate-bench/leaderboard").json()[0]["value"] == 77
    alice.send("PUT", f"{REPO}/settings", json={"gated": "manual"}).raise_for_status()


def test_only_the_card_on_main_shows(alice, stranger):
    commits = [commit["id"] for commit in alice.send("GET", f"{REPO}/commits/main").json()]
    for path in (REPO, f"{REPO}/revision/main", f"{REPO}/revision/{commits[0]}"):
        assert stranger.send("GET", path).json()["cardData"]["license"] == "apache-2.0"
    for rev in ("refs%2Fpr%2F1", commits[1], "nothing"):
        answer = stranger.send("GET", f"{REPO}/revision/{rev}")
        assert (answer.status_code, answer.headers["x-error-code"]) == (403, "GatedRepo")
    assert alice.send("GET", f"{REPO}/revision/refs%2Fpr%2F1").json()["cardData"]["license"] == "SECRET"


def test_what_is_talked_about_shows_only_to_who_may_read(alice, stranger):
    assert alice.send("GET", f"{REPO}/discussions").json()["count"] == 1
    assert stranger.send("GET", f"{REPO}/discussions").status_code == 403
    assert stranger.send("GET", "/alice/gated/discussions").status_code == 403


@pytest.mark.parametrize("private", [False, True])
def test_a_copy_keeps_the_gate(alice, hub, private):
    target = f"alice/gated-copy-{private}"
    body = {"repository": target, "private": private}
    alice.send("POST", f"{REPO}/duplicate", json=body).raise_for_status()
    shown = alice.send("GET", f"/api/models/{target}").json()
    assert (shown["gated"], shown["private"]) == ("manual", private)
    with Client(hub, None) as nobody:
        path = f"/{target}/resolve/main/.eval_results/a.yaml"
        assert nobody.send("GET", path).status_code == (404 if private else 403)
