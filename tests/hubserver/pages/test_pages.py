"""Every page over HTTP: status, content, escaping, odd addresses."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import HTML

COOK = "/alice/nano-moe-cook"
RECIPES = "/datasets/alice/kitchen-recipes"
PAGES = {
    "start": ("/", "Use this Hub"),
    "search": ("/?search=COOK", "cook-bake-merge"),
    "models": ("/models", "nano-moe-base"),
    "filtered": ("/models?base_model=alice/nano-moe-cook&sort=size", "nano-moe-cook-lora"),
    "datasets": ("/datasets", "kitchen-recipes"),
    "spaces": ("/spaces", "router-viewer"),
    "person": ("/alice", "nano-moe-cook"),
    "organisation": ("/lab", "The Expert Lab"),
    "model": (COOK, "Self-reported"),
    "dataset": (RECIPES, "Crème brûlée"),
    "dataset, other file": (f"{RECIPES}?file=data/test.csv", "serves"),
    "space": ("/spaces/alice/router-viewer", "Router viewer"),
    "gated": ("/lab/gated-moe", "Access to the files of this model is restricted"),
    "folder": (f"{COOK}/tree/main", "model.safetensors"),
    "folder inside": (f"{COOK}/tree/main/docs", "notes.md"),
    "folder of a pull request": (f"{COOK}/tree/refs%2Fpr%2F2", "PR 2"),
    "markdown": (f"{COOK}/blob/main/docs/notes.md", "Seed 7."),
    "source": (f"{COOK}/blob/main/README.md?plain=1", "library_name: transformers"),
    "code": (f"{COOK}/blob/main/train.py", "&#39;π&#39;"),
    "tensors": (f"{COOK}/blob/main/model.safetensors", "model.layers.1.mlp.experts.7.down_proj.weight"),
    "tensors by name": (f"{COOK}/blob/main/model.safetensors?q=gate.weight", "2 tensors"),
    "picture": (f"{COOK}/blob/main/plots/load.png", "<img src"),
    "rows of a file": (f"{RECIPES}/blob/main/data/train.jsonl", "Pickled cucumbers"),
    "no text": (f"{COOK}/blob/main/legacy/pytorch_model.bin", "A pickle can run any code"),
    "history": (f"{COOK}/commits/main", "Say how tokens are routed"),
    "discussions": (f"{COOK}/discussions", "Which experts were chosen?"),
    "closed ones": (f"{COOK}/discussions?status=closed&type=discussion", "Is there a GGUF?"),
    "discussion": (f"{COOK}/discussions/1", "By gate mass"),
    "pull request": (f"{COOK}/discussions/2", "n_shared_experts"),
    "conflict": (f"{COOK}/discussions/3", "Both sides changed:"),
    "merged": (f"{COOK}/discussions/4", "Merged"),
    "login": ("/login", "Access token"),
}


@pytest.mark.parametrize(("path", "text"), PAGES.values(), ids=PAGES)
def test_a_page_shows_what_it_is_for_and_is_closed_to_scripts(stranger, path, text):
    answer = stranger.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert text in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert "<script" not in answer.text
    assert re.search(r"\son\w+=", answer.text) is None
    assert answer.text.count("<h1") == 1
    assert answer.text.count("<main") == 1


@pytest.mark.parametrize("path", [path for path, _ in PAGES.values()])
def test_head_has_the_same_headers_and_no_body(stranger, path):
    head, get = stranger.client.head(path), stranger.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


def test_a_model_page_tells_lineage_parameters_and_how_to_load_it(stranger):
    text = stranger.get(COOK).text
    for expected in (
        'href="/alice/nano-moe-base"',
        'href="/datasets/alice/kitchen-recipes"',
        'href="/bob/nano-moe-bake"',
        'href="/bob/nano-moe-cook-lora"',
        'href="/bob/cook-bake-merge"',
        "<b>165k</b>",
        "AutoModelForCausalLM.from_pretrained(",
        f"git clone {stranger.url}/alice/nano-moe-cook",
        "hf download alice/nano-moe-cook",
    ):
        assert expected in text
    assert "base_model: alice" not in text  # the front matter is not part of the card


def test_scores_are_shown_as_what_they_are(stranger):
    text = re.sub(r"(<[^>]+>|\s)+", " ", stranger.get(COOK).text)
    assert "alice/kitchen-recipes bits_per_byte 1.107 self-reported, 2026-09-22, record" in text
    assert "longer 1.081 self-reported, proposed in #2 , record" in text


def test_a_chain_of_bases_is_shown_to_its_root_and_a_base_that_is_not_here_by_name(stranger):
    text = stranger.get("/bob/cook-bake-merge").text
    assert text.index('href="/alice/nano-moe-cook"') < text.index('href="/alice/nano-moe-base"')
    assert '<span title="not on this Hub">deepseek-ai/DeepSeek-V3</span>' in stranger.get("/lab/gated-moe").text


def test_a_dataset_page_names_the_models_trained_on_it(stranger):
    text = stranger.get(RECIPES).text
    assert "Models trained on it" in text
    assert 'href="/alice/nano-moe-cook"' in text


def test_filters_narrow_a_list_and_can_be_taken_back(stranger):
    text = stranger.get("/models?base_model=alice/nano-moe-cook&license=apache-2.0").text
    assert "nano-moe-bake" in text
    assert 'href="/alice/nano-moe-base"' not in text
    assert 'href="/models?license=apache-2.0"' in text
    assert "Nothing fits" in stranger.get("/models?license=mit").text


def test_each_entry_of_a_folder_has_its_own_last_commit(stranger):
    rows = re.findall(r"<tr>.*?</tr>", stranger.get(f"{COOK}/tree/main").text, re.DOTALL)
    last = {re.search(r'href="[^"]*/([^/"]+)"', row).group(1): row for row in rows[1:]}
    assert "Add a citation (#4)" in last["CITATION.cff"]
    assert "Say how tokens are routed" in last["config.json"]
    assert "Name the seed" in last["docs"]
    assert "Upload model" in last["README.md"]


def test_a_commit_page_has_the_diff_to_the_commit_before(stranger):
    commits = stranger.get("/api/models/alice/nano-moe-cook/commits/main").json()
    ids = {one["title"]: one["id"] for one in commits}
    text = stranger.get(f"{COOK}/commit/{ids['Say how tokens are routed']}").text
    assert '<tr class="added">' in text
    assert "scoring_func" in text
    first = stranger.get(f"{COOK}/commit/{ids['initial commit']}").text
    assert ".gitattributes" in first
    assert "added" in first


def test_a_pull_request_says_how_to_load_it_and_large_files_by_size(stranger):
    text = stranger.get(f"{COOK}/discussions/2").text
    assert "revision=&#34;refs/pr/2&#34;" in text
    assert "Large file: 337 kB before, 362 kB after." in text
    assert '<span class="change deleted">deleted</span>' in text
    assert "<q>Twice the steps, one shared expert</q>" in text
    assert "Merge into main" not in text


def test_a_hidden_comment_stays_hidden(stranger):
    text = stranger.get(f"{COOK}/discussions/1").text
    assert "buy cheap experts" not in text
    assert "This comment has been hidden." in text


@pytest.mark.parametrize(
    "path",
    [
        "/nope/nope",
        "/nobody",
        "/datasets/alice/nano-moe-cook",
        "/datasets/alice/tree/main",
        f"{COOK}/tree/nope",
        f"{COOK}/tree/main/nope",
        f"{COOK}/blob/main/nope.txt",
        f"{COOK}/commit/{'0' * 40}",
        f"{COOK}/discussions/99",
        f"{COOK}/discussions/x",
        f"{COOK}/discussions/%D9%A1",
        f"{COOK}/resolve/main/nope",
        "/alice/nope/resolve/main/x",
        f"{COOK}/nope",
        "/static/../secret",
        "/static/secret",
        "/static/%2e%2e%2fstyle.css",
        "/login/x",
        "/alice/%00",
        "/alice/%ff",
        "/%2e%2e/%2e%2e",
        "/<script>alert(1)</script>",
        f"{COOK}/tree/%00",
        f"{COOK}/blob/%00/x",
        "/?search=%3Cscript%3E&p=1#x",
        f"{COOK}/tree/main?p=9",
        "/models?p=999",
    ],
)
def test_odd_addresses_get_a_page_or_a_404_and_are_escaped(stranger, path):
    answer = stranger.get(path)
    assert answer.status_code in {200, 404}
    assert answer.status_code == (200 if "?" in path else 404)
    assert "<script" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/models?p=-1",
        "/models?p=x",
        f"{COOK}/blob/main/..%2f..%2fx",
        f"{COOK}/blob/main/a\\b",
        f"{COOK}/tree/main/a%2f%2fb",
        f"{COOK}/blob/%ff/x",
    ],
)
def test_impossible_addresses_are_refused_with_a_sentence(stranger, path):
    answer = stranger.get(path)
    assert answer.status_code in {400, 422}
    assert re.search(r"<h1>That cannot be done</h1>\s*<p>.+\.</p>", answer.text)


def test_a_slash_too_many_is_forgiven_but_never_leads_away(stranger):
    answer = stranger.get(f"{COOK}/")
    assert (answer.status_code, answer.headers["location"]) == (308, COOK)
    for path in ("//evil.example/", "/\\evil.example/", "//evil.example/%2f.."):
        location = stranger.client.get(stranger.url + path).headers.get("location", "/")
        assert re.match(r"/(?![/\\])", location)


def test_a_folder_and_a_file_lead_to_each_other(stranger):
    assert stranger.get(f"{COOK}/blob/main/docs").headers["location"] == f"{COOK}/tree/main/docs"
    assert stranger.get(f"{COOK}/tree/main/docs/notes.md").headers["location"] == f"{COOK}/blob/main/docs/notes.md"


def test_clients_get_json_where_they_did(stranger):
    for path in ("/nope/nope", "/nope/nope/resolve/main/x", "/api/models/nope/nope", "/no/such/page/at/all"):
        answer = stranger.get(path, headers={"accept": "*/*"})
        assert answer.status_code == 404
        assert answer.json()["error"]
    assert stranger.get("/api/models/nope/nope", headers=HTML).headers["x-error-code"] == "RepoNotFound"
    assert stranger.get("/api/models/nope/nope", headers=HTML).json()["error"]
    assert stranger.get("/nope/nope", headers={"accept": "*/*"}).headers["x-error-code"] == "RepoNotFound"


@pytest.mark.parametrize("path", ["/v1/xorb-grants/default/x", "/v2/shards", "/api/nope", "/xet/nope", "/lfs/nope"])
def test_what_an_api_lacks_stays_a_404_for_its_clients(stranger, path):
    for method in ("GET", "POST"):
        answer = stranger.client.request(method, path, headers={"accept": "*/*"})
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"


def test_a_control_character_in_an_address_does_not_break_the_answer_s_headers(stranger):
    for path in ("/api/models/alice/nano-moe-cook/tree/%00", f"{COOK}/resolve/%01%7f/x"):
        answer = stranger.get(path, headers={"accept": "*/*"})
        assert answer.status_code == 404
        assert answer.json()["error"]


@pytest.mark.parametrize("host", ["[::", "[", "a b", '"><script>', "x:y", "evil.example/", "a@b", "[::1]x"])
def test_a_host_that_is_none_is_refused(stranger, host):
    for path in ("/", "/api/models", COOK, f"{COOK}/resolve/main/config.json"):
        answer = stranger.get(path, headers={"host": host})
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")


@pytest.mark.parametrize("host", ["hub.example", "hub.example:80", "[::1]:7860", "127.0.0.1", "my_hub-1"])
def test_a_hub_answers_to_any_name_it_has(stranger, host):
    assert f"export HF_ENDPOINT=http://{host}" in stranger.get("/", headers={"host": host}).text


SEGMENTS = ["main", "refs%2Fpr%2F2", "README.md", "model.safetensors", "data/train.jsonl", "%00", "%ff", "..", "%2e%2e"]
SEGMENTS += [
    "1",
    "2",
    "0",
    "99999999999",
    "%F0%9F%90%8D",
    "%ED%A0%80",
    "x" * 300,
    "%3Cb%3E",
    "HEAD",
    "docs",
    "nope",
    "",
]
BASES = [COOK, RECIPES, "/lab/gated-moe", "/spaces/alice/router-viewer", "/alice/secret-moe", "", "/alice"]
PARTS = ["", "tree", "blob", "resolve", "commits", "commit", "discussions", "like", "ask-access", "login", "logout"]
QUERIES = [
    "",
    "?p=0",
    "?p=%ff",
    "?search=%00",
    "?sort=x",
    "?file=x&q=%ED%A0%80",
    "?status=x&type=y",
    "?next=//x",
    "?&=&",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT"]),
    st.builds(
        lambda base, part, rest, query: "/".join([base, part, *rest]) + query,
        st.sampled_from(BASES),
        st.sampled_from(PARTS),
        st.lists(st.sampled_from(SEGMENTS), max_size=3),
        st.sampled_from(QUERIES),
    ),
    st.sampled_from(["text/html", "*/*"]),
)
def test_no_request_makes_a_page_stumble(stranger, method, path, accept):
    headers = {"accept": accept, "origin": stranger.url}
    answer = stranger.client.request(method, stranger.url + path, headers=headers)
    assert answer.status_code < 500


def test_the_style_sheet_may_be_kept_for_ever_for_its_address_changes_with_it(stranger):
    address = re.search(r'href="(/static/style.css\?v=\w+)"', stranger.get("/").text).group(1)
    answer = stranger.get(address)
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in answer.headers["cache-control"]
