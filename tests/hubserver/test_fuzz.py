"""Every route of the Hub, with whatever a stranger may send: an answer below 500, and never a stack trace.

The routes and the words that they look for are read from the program itself, so that a new route is fuzzed at once.
"""

import ast
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hub_moe.hubserver
from hub_moe.hubserver.app import build_app
from hub_moe.hubserver.evaluations import parse_benchmark, parse_scores
from hub_moe.hubserver.pytest_plugin import create_hub
from hub_moe.hubserver.store import Store

from .client_over_http import Client

NOT_IMPLEMENTED = 501  # by which git-lfs knows that there are no file locks
GOOD = {
    "kinds": ["models", "datasets", "spaces"],
    "owner": ["alice", "bob", "lab"],
    "user": ["alice", "lab"],
    "name": ["fuzz", "fuzz.git", "gone"],
    "rev": ["main", "refs/pr/1", "v1", "HEAD", "0" * 40, "0123456"],
    "branch": ["main", "dev"],
    "num": ["1", "2"],
    "path": ["README.md", "w.bin", "folder", "model.safetensors.index.json"],
    "status": ["pending", "accepted"],
}
HOSTILE = [
    "",
    "%00",
    "%ff",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "%0d%0aX:%20y",
    "a" * 300,
    "%F0%9F%98%80",
    "9" * 30,
    "'",
]
BODIES = [
    *[b"", b"{}", b"[]", b"null", b"1", b"\xff\xfe", b"{" * 3000, b'"\\ud800"', b'{"a": NaN}', b"\x00" * 64, b"=&==&%"],
    *[b'{"key": "header", "value": {"summary": "m"}}\n{"key": "lfsFile", "value": {"path": "a", "oid": null}}\n'],
    *[
        b"paths=%00&paths=..&expand=1",
        b"0032want " + b"0" * 40 + b"\n00000009done\n",
        b"PACK\x00\x00\x00\x02\xff\xff\xff\xff",
    ],
]
CREDENTIALS = ["Bearer", "Bearer \xff", "Basic x", "Basic !!!", "Basic " + "A" * 5000, "Basic Og==", "x", "Bearer a b"]
TYPES = [
    "application/json",
    "application/x-ndjson",
    "application/x-www-form-urlencoded",
    "image/png",
    "text/plain",
    "\xff",
]


def list_routes(folder):
    """Method and path of every route."""
    with Store(folder) as store:
        routes = build_app(store).app.routes
    return [(method, route.path) for route in routes for method in sorted(route.methods)]


def read_words():
    """Every short text in the program: among them are all names of JSON fields and query parameters."""
    sources = Path(hub_moe.hubserver.__file__).parent.rglob("*.py")
    trees = [ast.parse(source.read_text("utf-8")) for source in sources]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return sorted(text for text in texts if isinstance(text, str) and text.isidentifier() and len(text) < 30)


words = st.sampled_from(read_words())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
yamls = st.builds(
    lambda tags, texts: "\n".join(f"{tag} {text}" for tag, text in zip(tags, texts, strict=False)),
    st.lists(
        st.sampled_from(
            ["a: !!int", "a: !!bool", "a: !!timestamp", "a: !!float", "? !!set", "- !!binary", "&x", "*x", "<<:"]
        )
    ),
    st.lists(st.text(max_size=8) | words | st.sampled_from(["{", "[", "0001-01-01 00:00:00+9", "0x", "1e999", "''"])),
)
objects = st.dictionaries(words, values, max_size=5)
bodies = st.one_of(
    objects.map(lambda value: json.dumps(value).encode()),
    st.lists(st.builds(lambda key, value: {"key": key, "value": value}, words, objects), max_size=3).map(
        lambda lines: "\n".join(map(json.dumps, lines)).encode()
    ),
    (values.map(json.dumps) | yamls).map(lambda text: json.dumps({"content": f"---\n{text}\n---\n"}).encode()),
    st.binary(max_size=100),
    st.sampled_from(BODIES),
)
queries = st.lists(st.tuples(words, st.text(max_size=10) | words | st.sampled_from(["-1", "1", "true"])), max_size=3)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub of its own, in which anything may be destroyed."""
    with create_hub(tmp_path_factory.mktemp("fuzzed") / "root").running() as running:
        yield running


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    return list_routes(tmp_path_factory.mktemp("routes"))


@pytest.fixture(scope="module")
def client(hub):
    with Client(hub) as client:
        fill(client)
        yield client


def fill(client):
    """A repo of every kind, a pull request and a discussion."""
    for kind in ("model", "dataset", "space"):
        client.create("fuzz", type=kind, sdk="static")
    client.create("bench", type="dataset")
    file = {"path": "eval.yaml", "content": "name: x\ntasks: [{id: a}]", "encoding": "utf-8"}
    lines = [{"key": "header", "value": {"summary": "m"}}, {"key": "file", "value": file}]
    client.send("POST", "/api/datasets/alice/bench/commit/main", content="\n".join(map(json.dumps, lines)).encode())
    client.commit("fuzz", {"README.md": b"---\nlicense: mit\n---\n", "folder/x": b"1"})
    client.commit("fuzz", {"w.bin": b"weights"}, as_large=True)
    client.commit("fuzz", {"y.txt": b"2"}, create_pr="1")
    client.send("POST", "/api/models/alice/fuzz/discussions", json={"title": "A talk"})


def check(client, method, path, **options):
    answer = client.send(method, path, **options)
    assert answer.status_code < 500 or answer.status_code == NOT_IMPLEMENTED, (method, path, options, answer.text)
    assert "Traceback" not in answer.text, (method, path, options, answer.text)
    return answer


@settings(max_examples=300)
@given(yamls | values.map(lambda value: json.dumps([{"dataset": value, "value": value, "source": value}])))
def test_any_text_is_a_list_of_scores_and_a_benchmark_or_says_why_not(text):
    for score in parse_scores("x.yaml", text):
        json.dumps(score.describe(), allow_nan=False)
        assert score.data or score.error
    parse_benchmark(text)


def put_in(path, choose):
    """A route's path with each of its parts chosen."""
    pieces = []
    for piece in path.split("/"):
        before, brace, rest = piece.partition("{")
        part, _, after = rest.partition("}")
        pieces.append(before + choose(part.partition(":")[0]) + after if brace else piece)
    return "/".join(pieces)


def fill_in(path, *, instead_of=None, text=""):
    """A route's path with good parts, but for the one that `text` stands in for."""
    count = itertools.count()
    return put_in(path, lambda part: text if next(count) == instead_of else quote(GOOD.get(part, ["x"])[0], safe=""))


def test_no_route_stumbles_over_a_hostile_body(client, routes):
    bodies = itertools.cycle(BODIES)
    for method, path in routes:
        for body in itertools.islice(bodies, 3 if method in {"POST", "PUT"} else 0):
            check(client, method, fill_in(path), content=body, headers={"content-type": "application/json"})
    fill(client)


def test_no_route_stumbles_over_a_hostile_address_query_or_credential(client, routes):
    hostile, credentials = itertools.cycle(HOSTILE), itertools.cycle(CREDENTIALS)
    for number, (method, path) in enumerate(routes):
        turn = number % max(1, path.count("{"))
        check(client, method, fill_in(path, instead_of=turn, text=next(hostile)))
        check(client, method, f"{fill_in(path)}?p=-1&limit=x&cursor=%ff&expand=%00&search=%00&filter=a,b&diff=maybe")
        headers = {"authorization": next(credentials).encode("latin-1"), "cookie": "session=%ff; =;;"}
        check(client, method, fill_in(path), headers=headers)
    fill(client)


def test_what_is_deleted_moved_and_copied_while_others_look_is_there_or_not_found(hub, client):
    score = b"- {dataset: {id: alice/bench, task_id: a}, value: 1}"
    looks = ["/api/models?full=true&expand=evalResults", "/api/datasets/alice/bench/leaderboard", "/models", "/alice/m"]
    looks += ["/api/models/alice/m", "/api/models/alice/m2/tree/main?expand=true", "/api/models/alice/m2/lfs-files"]
    end = time.monotonic() + 4

    def look():
        with Client(hub) as other:
            while time.monotonic() < end:
                for path in looks:
                    check(other, "GET", path)

    with ThreadPoolExecutor() as pool:
        looking = [pool.submit(look) for _ in range(2)]
        while time.monotonic() < end:
            check(client, "POST", "/api/repos/create", json={"name": "m"})
            client.commit("m", {".eval_results/x.yaml": score})
            client.commit("m", {"w.bin": b"weights"}, as_large=True)
            check(client, "POST", "/api/repos/move", json={"fromRepo": "alice/m", "toRepo": "alice/m2"})
            check(client, "POST", "/api/models/alice/m2/duplicate", json={"repository": "alice/m3"})
            for name in ("m2", "m3"):
                check(client, "DELETE", "/api/repos/delete", json={"name": name})
        for one in looking:
            one.result()


@settings(max_examples=250, suppress_health_check=[*HealthCheck], deadline=None)
@given(data=st.data())
def test_no_request_makes_the_hub_stumble(client, routes, data):
    method, path = data.draw(st.sampled_from(routes))
    if data.draw(st.integers(0, 9)) == 0:
        method = data.draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]))

    def choose(part):
        good = st.sampled_from(GOOD.get(part, ["x"])).map(lambda text: quote(text, safe=""))
        return data.draw(good | good | st.text(max_size=8).map(lambda text: quote(text, safe="", errors="replace")))

    headers = {"content-type": data.draw(st.sampled_from(TYPES)).encode("latin-1")}
    if data.draw(st.booleans()):
        headers["range"] = data.draw(
            st.sampled_from(["bytes=0-", "bytes=-1", "bytes=9-1", "bytes=a-b", "x", "bytes=0-0,2-3"])
        )
    address = put_in(path, choose)
    query = "&".join(f"{name}={quote(text, errors='replace')}" for name, text in data.draw(queries))
    check(client, method, f"{address}?{query}", content=data.draw(bodies), headers=headers)
