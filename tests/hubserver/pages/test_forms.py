"""Logging in, and everything a person can change by a form; nobody can make them do it from another site."""

import json

import pytest

from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store

from .conftest import Town, Visitor
from .showcase import Author, fill, png

COOK = "/alice/nano-moe-cook"


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A Hub of this file's own, to change."""
    hub = create_hub(tmp_path_factory.mktemp("square") / "root")
    talk = fill(hub)
    with hub.running():
        yield Town(hub, talk)


@pytest.fixture
def enter(square):
    visitors = []

    def start(user=None, token=None):
        visitors.append(Visitor(square.url, token or (square.hub.tokens[user] if user else None)))
        return visitors[-1]

    yield start
    for visitor in visitors:
        visitor.client.close()


def _new_token(hub: Hub, user, name):
    with Store(hub.root) as store:
        return store.accounts.create_token(user, name=name)


def test_the_cookie_is_out_of_reach_and_holds_no_token(square, enter):
    visitor = enter()
    answer = visitor.post("/login", token=square.hub.tokens["alice"], next=f"{COOK}/discussions?status=all")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{COOK}/discussions?status=all")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "max-age=1209600" in cookie
    assert "path=/" in cookie
    assert square.hub.tokens["alice"].lower() not in cookie


@pytest.mark.parametrize(
    "goal", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "", "/\tx", "/é"]
)
def test_logging_in_never_leads_to_another_site(square, enter, goal):
    assert enter().post("/login", token=square.hub.tokens["bob"], next=goal).headers["location"] == "/"


@pytest.mark.parametrize("token", ["hf_wrong", "", "x" * 400, "é\u2028", "' OR 1=1 --"])
def test_a_token_that_nobody_has_is_refused(enter, token):
    answer = enter().post("/login", token=token)
    assert answer.status_code == 401
    assert "Nobody on this Hub has this token" in answer.text
    assert "set-cookie" not in answer.headers


def test_logging_out_ends_the_session_everywhere(enter):
    visitor = enter("alice")
    kept = dict(visitor.client.cookies)
    assert visitor.post("/logout").status_code == 303
    assert not visitor.client.cookies
    visitor.client.cookies.update(kept)
    assert visitor.get("/alice/secret-moe").status_code == 404


def test_revoking_the_token_ends_the_session(square, enter):
    visitor = enter(token=_new_token(square.hub, "alice", "laptop"))
    assert visitor.get("/alice/secret-moe").status_code == 200
    with Store(square.hub.root) as store:
        store.accounts.revoke_token("alice", "laptop")
    assert visitor.get("/alice/secret-moe").status_code == 404
    assert visitor.post(f"{COOK}/discussions/1", comment="still here?").status_code == 401


def test_a_session_that_has_run_out_is_no_good(square, enter):
    visitor = enter("alice")
    with Store(square.hub.root) as store, store.database.transaction() as connection:
        connection.execute("UPDATE sessions SET expires_at = 1")
    assert visitor.get("/alice/secret-moe").status_code == 404


def test_a_forged_cookie_is_no_cookie(enter):
    visitor = enter("alice")
    (name, value), *_ = visitor.client.cookies.items()
    for forged in (value[:-2] + "xx", "x", "", "a.b.c", value.partition(".")[0], "é"):
        visitor.client.cookies.clear()
        answer = visitor.get("/alice/secret-moe", headers={"cookie": f"{name}={forged}".encode()})
        assert answer.status_code == 404


def test_the_cookie_does_not_open_the_api(enter):
    visitor = enter("alice")
    assert visitor.get("/api/whoami-v2").status_code == 401
    assert visitor.get("/api/models/alice/secret-moe").status_code == 404
    assert "secret-moe" not in visitor.get("/api/models").text
    body = json.dumps({"title": "By cookie"})
    answer = visitor.client.post("/api/models/alice/nano-moe-cook/discussions", content=body)
    assert answer.status_code == 401


def test_a_discussion_is_opened_answered_renamed_closed_and_opened_again(enter):
    bob = enter("bob")
    answer = bob.post(f"{COOK}/discussions", title="A <b>bold</b> question", description="Why *six*?\r\n\r\nReally.")
    assert answer.status_code == 303
    path = answer.headers["location"]
    text = bob.get(path).text
    assert "A &lt;b&gt;bold&lt;/b&gt; question" in text
    assert "<p>Why <em>six</em>?</p>\n<p>Really.</p>" in text
    assert bob.post(path, comment="And that is that.", status="closed").status_code == 303
    assert 'class="state closed">closed' in bob.get(path).text
    assert bob.post(path, status="open").status_code == 303
    assert bob.post(path, title="A calm question").status_code == 303
    assert "A calm question" in bob.get(f"{COOK}/discussions").text


def test_a_pull_request_is_merged_by_who_may(square, enter):
    path = f"{COOK}/discussions/{square.talk['patch']}"
    assert enter("bob").post(f"{path}/merge").status_code == 403
    assert "Merge into main" not in enter("bob").get(path).text
    assert "Merge into main" not in enter("reader").get(path).text
    assert enter("reader").post(f"{path}/merge").status_code == 403
    alice = enter("alice")
    assert "Merge into main" in alice.get(path).text
    assert alice.post(f"{path}/merge").headers["location"] == path
    assert 'class="state merged">merged' in alice.get(path).text
    assert alice.post(f"{path}/merge").status_code == 400
    assert "British spelling" in alice.get(COOK).text
    assert "n_shared_experts" in alice.get(path).text  # the diff stays


def test_a_conflict_is_refused_with_the_names_of_the_files(square, enter):
    answer = enter("alice").post(f"{COOK}/discussions/{square.talk['stale']}/merge")
    assert answer.status_code == 409
    assert "docs/notes.md" in answer.text


def test_a_draft_is_made_ready_and_its_lost_commits_do_not_break_the_page(square, enter):
    alice = enter("alice")
    headers = {"authorization": f"Bearer {square.hub.tokens['alice']}"}
    fields = {"title": "A draft", "pullRequest": True}
    answer = alice.client.post("/api/models/alice/nano-moe-cook/discussions", json=fields, headers=headers).json()
    path = f"{COOK}/discussions/{answer['num']}"
    assert "it can be merged once it is marked as ready" in alice.get(path).text
    assert alice.post(path, status="open").status_code == 303
    with Store(square.hub.root) as store:
        author = Author(store, square.hub.tokens["alice"])
        store.commits.delete_ref(author.find("alice/nano-moe-cook"), f"refs/pr/{answer['num']}")
    text = alice.get(path).text
    assert "The commits of this pull request are gone" in text


def test_a_comment_is_hidden_by_its_author_or_the_owner_only(square, enter):
    bob, alice = enter("bob"), enter("alice")
    path = f"{COOK}/discussions/{square.talk['question']}"
    with Store(square.hub.root) as store:
        repo = Author(store, square.hub.tokens["alice"]).find("alice/nano-moe-cook")
        events = store.discussions.events(repo, store.discussions.find(repo, square.talk["question"]))
    assert bob.post(f"{path}/hide/{events[1].id}").status_code == 403
    assert alice.post(f"{path}/hide/{events[1].id}").status_code == 303
    assert "By gate mass" not in alice.get(path).text
    assert alice.post(f"{path}/hide/nope").status_code == 404


def test_access_to_a_gated_repo_is_asked_for(square, enter):
    with Store(square.hub.root) as store:
        store.accounts.add_user("carol")
    carol = enter(token=_new_token(square.hub, "carol", "default"))
    assert "Ask for access" in carol.get("/lab/gated-moe").text
    assert carol.post("/lab/gated-moe/ask-access").status_code == 303
    assert "has not answered yet" in carol.get("/lab/gated-moe").text
    assert carol.post(f"{COOK}/ask-access").status_code == 400


def test_a_repo_is_liked_and_the_like_taken_back(enter):
    alice = enter("alice")
    assert "♡ Like" in alice.get(COOK).text
    assert alice.post(f"{COOK}/like").headers["location"] == COOK
    assert "♥ Liked" in alice.get(COOK).text
    assert "♥ 2 likes" in enter().get(COOK).text
    alice.post(f"{COOK}/like", undo="1")
    assert "♥ 1 like<" in enter().get(COOK).text
    assert enter("reader").post(f"{COOK}/like").status_code == 403
    assert "Like" not in enter("reader").get("/bob/nano-moe-bake").text


def test_a_picture_attached_to_a_comment_is_shown(square, enter):
    alice = enter("alice")
    headers = {"authorization": f"Bearer {square.hub.tokens['alice']}", "content-type": "image/png"}
    address = alice.client.post("/uploads", content=png(4, 4), headers=headers).text
    path = f"{COOK}/discussions/{square.talk['merged']}"
    alice.post(path, comment=f"![see]({address})")
    local = address.removeprefix(square.url)
    assert f'<img src="{local}" alt="see">' in alice.get(path).text
    assert alice.get(local).headers["content-type"] == "image/png"


def test_a_token_that_may_only_read_reads_and_changes_nothing(enter):
    reader = enter("reader")
    assert reader.get("/alice/secret-moe").status_code == 200
    assert reader.post(f"{COOK}/discussions", title="Not allowed").status_code == 403
    assert reader.post(f"{COOK}/discussions/1", comment="Not allowed").status_code == 403


FORMS = [
    f"{COOK}/like",
    f"{COOK}/discussions",
    f"{COOK}/discussions/1",
    f"{COOK}/discussions/3/merge",
    "/lab/gated-moe/ask-access",
]


@pytest.mark.parametrize("path", [*FORMS, "/logout", f"{COOK}/discussions/1/hide/x"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://["},
        {"origin": "http://127.0.0.1.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
def test_a_form_from_another_site_is_refused(enter, path, headers):
    answer = enter("alice").post(path, headers=headers, title="forged title", comment="forged")
    assert answer.status_code == 403
    assert "did not come from a page of this Hub" in answer.text


@pytest.mark.parametrize("path", FORMS)
def test_a_form_needs_its_own_token_and_a_session(enter, path):
    alice = enter("alice")
    for wrong in ("", "0" * 64, "é", enter("bob").form_token, enter("alice").form_token):
        assert alice.post(path, form_token=wrong, title="forged title", comment="forged").status_code == 403
    assert enter().post(path, title="no session").status_code == 401


def test_logging_in_from_another_site_is_refused(square, enter):
    answer = enter().post("/login", headers={"origin": "https://evil.example"}, token=square.hub.tokens["bob"])
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{}", "application/json"),
        (b"\xff\xfe", "application/x-www-form-urlencoded"),
        (b"comment=%ff", "application/x-www-form-urlencoded"),
        (b"&".join([b"a=1"] * 100), "application/x-www-form-urlencoded"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"", ""),
    ],
)
def test_what_is_no_form_is_refused_with_a_sentence(enter, content, kind):
    alice = enter("alice")
    headers = {"origin": alice.url, "content-type": kind}
    answer = alice.client.post(f"{COOK}/discussions/1", content=content, headers=headers)
    assert answer.status_code in {400, 403}
    assert "<h1>" in answer.text


@pytest.mark.parametrize(
    "fields",
    [{}, {"comment": " "}, {"comment": "x" * 70_000}, {"status": "merged"}, {"title": "x"}, {"title": "x" * 300}],
)
def test_what_cannot_be_said_is_refused_with_a_sentence(enter, fields):
    assert enter("alice").post(f"{COOK}/discussions/1", **fields).status_code == 400


def test_get_changes_nothing(enter):
    alice = enter("alice")
    for path in ("/logout", f"{COOK}/discussions/3/merge", f"{COOK}/ask-access", f"{COOK}/like"):
        assert alice.get(path).status_code in {404, 405}
    assert alice.get("/alice/secret-moe").status_code == 200
