"""What is private is not there for others, whatever page they try; gated files stay closed."""

import re

import pytest

from .conftest import FORM_TOKEN

PATHS = ["", "/tree/main", "/blob/main/README.md", "/commits/main", "/commit/main", "/discussions", "/discussions/1"]
PATHS += ["/resolve/main/README.md", "/tree/main/x", "/nope"]


def _comparable(answer, name):
    text = FORM_TOKEN.sub("", answer.text.replace(name, "NAME"))
    kept = {
        key: value for key, value in answer.headers.items() if key not in {"date", "content-length", "x-request-id"}
    }
    return answer.status_code, kept, text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("user", [None, "bob"])
def test_a_private_repo_looks_exactly_like_one_that_does_not_exist(visit, path, user):
    visitor = visit(user)
    real, made_up = visitor.get(f"/alice/secret-moe{path}"), visitor.get(f"/alice/absent-moe{path}")
    assert real.status_code == 404
    assert _comparable(real, "secret-moe") == _comparable(made_up, "absent-moe")
    for method in ("POST", "DELETE", "HEAD"):
        one, other = (visitor.client.request(method, f"/alice/{n}{path}") for n in ("secret-moe", "absent-moe"))
        assert _comparable(one, "secret-moe") == _comparable(other, "absent-moe")


def test_nobody_else_sees_the_name_of_a_private_repo_in_any_list(visit):
    for visitor in (visit(), visit("bob")):
        for path in ("/", "/models", "/datasets", "/alice", "/?search=secret", "/datasets?search=gates"):
            text = visitor.get(path).text
            assert "secret-moe" not in text
            assert "notes-on-gates" not in text


def test_its_owner_sees_it_after_logging_in(visit):
    alice = visit("alice")
    assert "Not yet" in alice.get("/alice/secret-moe").text
    assert "secret-moe" in alice.get("/models").text
    assert alice.get("/alice/secret-moe/resolve/main/README.md").text == "# Not yet\n"


def test_a_gated_repo_shows_its_card_and_keeps_its_files(visit):
    for visitor in (visit(), visit("reader")):
        text = visitor.get("/lab/gated-moe").text
        assert "Ask first." in text
    stranger = visit()
    for path in ("/tree/main", "/blob/main/README.md", "/commits/main", "/resolve/main/README.md"):
        answer = stranger.get(f"/lab/gated-moe{path}")
        assert answer.status_code == 403
        assert answer.headers["x-error-code"] == "GatedRepo"
        assert "restricted" in answer.text
        assert re.search(r"<h1>Not allowed</h1>", answer.text)


def test_pages_are_not_kept_by_caches_that_serve_others(stranger):
    headers = stranger.get("/").headers
    assert headers["cache-control"] == "private, no-cache"
    assert "Cookie" in headers["vary"]


def test_a_page_for_who_is_logged_in_is_kept_nowhere(visit):
    alice = visit("alice")
    for path in ("/", "/models", "/no/such"):
        assert alice.get(path).headers["cache-control"] == "no-store"
