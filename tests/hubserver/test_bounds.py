"""Small files that would stand for much work or memory: each is shown without, and lists go on working."""

import json
import time
from pathlib import Path

import pytest

from hub_moe.hubserver.cards import count_parameters, parse_object, parse_yaml, read_card

from .client_over_http import Client

LISTS = ("/api/models?full=true", "/models", "/", "/alice/{name}", "/api/models/alice/{name}")
DEEP = b'{"model_type": "m", "auto_map": ' + b"[" * 900 + b"]" * 900 + b"}"


def weights(*shapes):
    tensors = {f"t{number}": {"dtype": "F32", "shape": shape} for number, shape in enumerate(shapes)}
    return json.dumps(tensors).replace('"HUGE"', "1" + "0" * 400).encode()


def read_peak_kb(hub):
    lines = Path(f"/proc/{hub.pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def as_file(header):
    return len(header).to_bytes(8, "little") + header


@pytest.fixture(scope="module")
def client(hub):
    with Client(hub) as client:
        yield client


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("deep-config", {"config.json": DEEP}),
        ("huge-shape", {"m.safetensors": as_file(weights(["HUGE"]))}),
        ("huge-product", {"m.safetensors": as_file(weights([1 << 62] * 16))}),
        ("deep-card", {"README.md": b"---\na: " + b"[" * 20_000 + b"\n---\n"}),
    ],
)
def test_a_hostile_file_does_not_break_lists(client, name, files):
    client.create(name)
    assert client.commit(name, files).status_code == 200
    for path in LISTS:
        assert client.send("GET", path.format(name=name)).status_code == 200
    client.send("DELETE", "/api/repos/delete", json={"name": name}).raise_for_status()


@pytest.mark.parametrize("header", [DEEP, b'{"__metadata__": {"a": 1e999}, "b": ' + b"[" * 500 + b"]" * 500 + b"}"])
def test_the_headers_of_weights_are_refused_if_they_cannot_be_sent(client, header):
    client.create("headers")
    index = b'{"weight_map": {"a": "m.safetensors"}}'
    client.commit("headers", {"i.json": index, "m.safetensors": as_file(header)})
    assert client.send("GET", "/api/models/alice/headers/safetensors-metadata/i.json").status_code == 404
    client.send("DELETE", "/api/repos/delete", json={"name": "headers"}).raise_for_status()


@pytest.mark.parametrize(
    "shapes",
    [
        ([1 << 63],),
        ([1 << 62, 2],),
        ([-1],),
        ([1.5],),
        (["1"],),
        ([True],),
        ([1] * 17,),
        ([1 << 62], [1 << 62]),
        ("123",),
    ],
)
def test_shapes_that_no_tensor_has_are_not_counted(shapes):
    assert count_parameters([weights(*shapes)]) is None


def test_shapes_that_tensors_have_are_counted():
    assert count_parameters([weights([2, 3], []), weights([0])])["total"] == 7


def test_a_shape_of_many_lengths_takes_no_time():
    start_s = time.monotonic()
    assert count_parameters([weights([10**18] * 200_000)]) is None
    assert time.monotonic() - start_s < 20


def test_many_kinds_of_numbers_are_not_counted():
    assert (
        count_parameters([json.dumps({f"t{n}": {"dtype": f"D{n}", "shape": [1]} for n in range(500)}).encode()]) is None
    )


def test_headers_are_counted_one_at_a_time(hub, client):
    client.create("notes")
    notes = b'"__metadata__": {"a": "' + b"x" * 4_000_000 + b'"}}'
    headers = [b'{"t%d": {"dtype": "F32", "shape": [2]}, ' % number + notes for number in range(15)]
    files = {f"m{number}.safetensors": as_file(header) for number, header in enumerate(headers)}
    client.commit("notes", files, as_large=True).raise_for_status()
    before_kb = read_peak_kb(hub)
    shown = client.send("GET", "/api/models/alice/notes").json()
    assert shown["safetensors"]["total"] == 30
    assert read_peak_kb(hub) - before_kb < 40_000


def test_the_same_weights_under_many_names_are_read_once(client):
    client.create("copies")
    client.commit("copies", {f"m{number}.safetensors": as_file(weights([7])) for number in range(20)})
    shown = client.send("GET", "/api/models/alice/copies?expand=safetensors").json()
    assert shown["safetensors"]["total"] == 7


@pytest.mark.parametrize("text", ["a: " + "[" * 20_000, "- " * 20_000, "? " * 20_000, "{a: " * 20_000])
def test_yaml_that_is_nested_deeply_is_refused_at_once(client, text):
    start_s = time.monotonic()
    answer = client.send("POST", "/api/validate-yaml", json={"content": f"---\n{text}\n---\n"})
    assert answer.status_code == 400
    assert "nested too deeply" in answer.json()["errors"][0]["message"]
    assert time.monotonic() - start_s < 30


def test_long_yaml_is_refused_and_a_long_text_below_it_is_not():
    assert "characters" in read_card("---\n" + "a: [1, 2]\n" * 30_000 + "---\n").errors[0]
    assert read_card("---\na: 1\n---\n" + "word " * 100_000).data == {"a": 1}


def test_what_is_nested_as_cards_are_is_read():
    text = "[" * 50 + "]" * 50
    assert parse_yaml(text) == json.loads(text) == parse_object(f'{{"a": {text}}}'.encode())["a"]


def test_a_page_renders_only_as_many_comments_as_it_can_bear(client):
    client.create("talk")
    body = {"title": "Long talk", "description": "**first**"}
    client.send("POST", "/api/models/alice/talk/discussions", json=body).raise_for_status()
    comment = {"comment": "<script>" + "**bold** " * 6_000}
    for _ in range(9):
        client.send("POST", "/api/models/alice/talk/discussions/1/comment", json=comment).raise_for_status()
    page = client.send("GET", "/alice/talk/discussions/1").text
    assert "<strong>first</strong>" in page
    assert page.count("**bold**") == 2 * 6_000
    assert "<script" not in page


def test_children_are_counted_for_a_whole_list(client):
    for number in range(25):
        client.create(f"family-{number}")
        client.commit(f"family-{number}", {"README.md": b"---\nbase_model: alice/family-0\n---\n"})

    found = client.send("GET", "/api/models?search=family-&expand=childrenModelCount").json()
    assert {one["id"]: one["childrenModelCount"] for one in found}["alice/family-0"] == 25
    assert sum(one["childrenModelCount"] for one in found) == 25
