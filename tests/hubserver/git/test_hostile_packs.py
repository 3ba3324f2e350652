"""Packs that no honest git sends: each is refused with a sentence, and the repo is as it was."""

import hashlib
import io
import struct
import time
import zlib

import pytest
from dulwich.objects import Blob, Commit, Tag, Tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults
from hub_moe.hubserver.store.packs import object_header

from ..client_over_http import Client

NOTHING = "0" * 40
FILE, LINK, FOLDER = 0o100644, 0o120000, 0o040000


@pytest.fixture(scope="module")
def client(hub):
    with Client(hub) as client:
        client.create("packs")
        client.commit("packs", {"x.txt": b"x"})
        with Client(hub, "bob") as bob:
            bob.create("owner-of-secret", visibility="private")
        yield client


@pytest.fixture(autouse=True)
def unchanged(hub, client):
    """After each test the repo has the refs and objects that it had, and is whole."""
    before = _state(hub, client)
    yield
    assert _state(hub, client) == before
    with Store(hub.root) as store:
        assert list(find_faults(store)) == []


def _state(hub, client):
    refs = client.send("GET", "/api/models/alice/packs/refs?include_prs=1").json()
    return refs, sorted(path.relative_to(hub.root) for path in hub.root.glob("repos/*/objects/**/*"))


def entry(type_num, content, *, size=None, base=b""):
    return object_header(type_num, len(content) if size is None else size) + base + zlib.compress(content)


def pack(*entries, count=None):
    body = struct.pack(">4sII", b"PACK", 2, len(entries) if count is None else count) + b"".join(entries)
    return body + hashlib.sha1(body, usedforsecurity=False).digest()


def pack_of(*things):
    return pack(*(entry(thing.type_num, thing.as_raw_string()) for thing in things))


def tree_of(*items):
    tree = Tree()
    for name, mode, thing in items:
        tree.add(name, mode, getattr(thing, "id", thing))
    return tree


def commit_of(tree, *parents, **fields):
    commit = Commit()
    commit.tree, commit.parents = getattr(tree, "id", tree), list(parents)
    commit.author = commit.committer = b"a <a@b>"
    commit.author_time = commit.commit_time = fields.get("at", int(time.time()))
    commit.author_timezone = commit.commit_timezone = 0
    commit.message = b"m"
    return commit


def push(client, tip, content, *, ref="refs/heads/evil", old=NOTHING, repo="packs"):
    tip = getattr(tip, "id", tip)
    line = f"{old} {tip.decode() if isinstance(tip, bytes) else tip} {ref}\0report-status".encode()
    return post(client, b"%04x%s0000" % (len(line) + 4, line) + content, repo=repo)


def post(client, body, *, repo="packs", kind="application/x-git-receive-pack-request"):
    return client.send("POST", f"/alice/{repo}/git-receive-pack", content=body, headers={"content-type": kind})


def refused(client, tip, content, **options):
    """The sentence with which the server refuses."""
    answer = push(client, tip, content, **options)
    assert answer.status_code == 200, answer.text
    assert b"ok refs" not in answer.content
    assert client.send("GET", f"/api/models/alice/packs/revision/{tip.id.decode()}").status_code == 404
    return answer.content.partition(b"ng refs/heads/evil ")[2].decode()


blob = Blob.from_string(b"content")


@pytest.mark.parametrize(
    ("name", "mode", "sentence"),
    [
        (b"..", FILE, "'..' is not a valid path"),
        (b".git", FOLDER, "is not a valid path"),
        (b".GIT", FILE, "is not a valid path"),
        (b"git~1", FILE, "is not a valid path"),
        (".g\u200cit".encode(), FILE, "is not a valid path"),
        (b"a/b", FILE, "holds a slash"),
        (b"a\\b", FILE, "backslash"),
        (b"a\nb", FILE, "control character"),
        (b"\xff", FILE, "is not UTF-8"),
        (b"x" * 256, FILE, "is not a valid path"),
        (b"link", LINK, "a symbolic link"),
        (b"module", 0o160000, "a submodule"),
        (b"group", 0o100664, "of the mode 100664"),
        (b"setuid", 0o104755, "of the mode 104755"),
    ],
)
def test_a_name_or_mode_that_misleads_is_refused(client, name, mode, sentence):
    tree = tree_of((name, mode, blob))
    commit = commit_of(tree)
    assert sentence in refused(client, commit, pack_of(blob, tree, commit))


@pytest.mark.parametrize("raw", [b"100644 b\0%s100644 a\0%s", b"100644 a\0%s100644 a\0%s", b"0100644 a\0%s", b"x"])
def test_a_tree_that_is_not_well_formed_is_refused(client, raw):
    raw = raw.replace(b"%s", blob.sha().digest())
    tree = hashlib.sha1(b"tree %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest().encode()
    commit = commit_of(tree)
    content = pack(entry(3, b"content"), entry(2, raw), entry(1, commit.as_raw_string()))
    assert refused(client, commit, content)


def test_every_object_that_a_commit_needs_must_come_or_be_there(client):
    inner = tree_of((b"x", FILE, blob))
    tree = tree_of((b"d", FOLDER, inner))
    commit = commit_of(tree)
    for missing in (blob, inner, tree):
        things = [thing for thing in (blob, inner, tree, commit) if thing is not missing]
        assert missing.id.decode() in refused(client, commit, pack_of(*things))
    child = commit_of(tree, b"1" * 40)
    assert "1" * 40 in refused(client, child, pack_of(blob, inner, tree, child))
    assert "misses" in refused(client, commit, pack())


def test_what_a_tree_names_must_be_of_the_kind_it_says(client):
    empty = Tree()
    for mode, thing in ((FILE, empty), (FOLDER, blob)):
        tree = tree_of((b"x", mode, thing))
        commit = commit_of(tree)
        assert "should be a" in refused(client, commit, pack_of(thing, tree, commit))
    commit = commit_of(blob.id)
    assert "should be a folder" in refused(client, commit, pack_of(blob, commit))
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree, tree.id)
    assert "should be a commit" in refused(client, commit, pack_of(blob, tree, commit))


def test_objects_that_nothing_needs_are_refused(client):
    tree, stray = tree_of((b"x", FILE, blob)), Blob.from_string(b"stray")
    commit = commit_of(tree)
    assert "no pushed ref needs" in refused(client, commit, pack_of(blob, tree, commit, stray))
    assert client.send("GET", f"/api/models/alice/packs/revision/{commit.id.decode()}").status_code == 404


def test_a_pointer_to_a_large_file_of_another_repo_or_of_a_false_size_is_refused(hub, client):
    with Client(hub, "bob") as bob:
        bob.create("owner-of-secret", visibility="private")
        secret = bob.upload("owner-of-secret", b"secret weights")
    own = client.upload("packs", b"own")
    for sha256, size in ((secret, 14), (own, 4)):
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        pointer = Blob.from_string(text.encode())
        tree = tree_of((b"w.bin", FILE, pointer))
        commit = commit_of(tree)
        assert "never uploaded" in refused(client, commit, pack_of(pointer, tree, commit))


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:30] + bytes([whole[30] ^ 1]) + whole[31:],
        lambda whole: b"JUNK" + whole[4:],
        lambda whole: b"",
        lambda whole: whole + b"more",
    ],
)
def test_a_pack_that_is_cut_or_damaged_is_refused(client, change):
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree)
    assert "pack" in refused(client, commit, change(pack_of(blob, tree, commit)))


def test_a_pack_whose_counts_and_sizes_lie_is_refused_before_memory_is_spent(client):
    commit = commit_of(tree_of((b"x", FILE, blob)))
    bomb = zlib.compress(bytes(60_000_000))
    for content, sentence in (
        (pack(entry(3, b"content"), count=2), "cut short"),
        (pack(entry(3, b"content"), entry(3, b"other"), count=1), "after its last object"),
        (pack(count=4_000_000_000), "at most"),
        (pack(object_header(3, 60_000_000) + bomb), "too large for git"),
        (pack(object_header(3, 1000) + bomb), "not the size it says"),
        (pack(object_header(3, 1 << 55) + bomb), "too large for git"),
        (pack(bytes([0xB0]) + b"\xff" * 1000), "not a number"),
        (pack(entry(5, b"content")), "unknown type 5"),
        (pack(entry(3, b"content", size=6)), "not the size it says"),
        (pack(entry(3, b"content", size=8)), "not the size it says"),
        (pack(object_header(3, 7) + b"not zlib"), "damaged object"),
    ):
        assert sentence in refused(client, commit, content)


def test_deltas_are_resolved_and_their_bombs_and_loops_refused(client):
    commit = commit_of(tree_of((b"x", FILE, blob)))
    base = entry(3, b"content")
    bomb = b"\x07" + b"\x80\x9f\xc6\x4c" + b"\xb0\x07\x00" * 10  # says that it unfolds to 160 MB
    for delta, sentence in (
        (entry(6, bomb, base=bytes([len(base)])), "too large for git"),
        (entry(6, b"\x07\x07\x90\x07", base=b"\x00"), "lies nowhere"),
        (entry(6, b"\x07\x07\x90\x07", base=b"\xff" * 20), "lies nowhere"),
        (entry(6, b"\x07\x07\x90\x07", base=b"\x05"), "whose base is neither"),
        (entry(7, b"\x07\x07\x90\x07", base=b"\1" * 20), "whose base is neither"),
        (entry(6, b"\x08\x07\x90\x07", base=bytes([len(base)])), "does not fit"),
        (entry(6, b"\x07\x07\x90\x08", base=bytes([len(base)])), "does not fit"),
        (entry(6, b"", base=bytes([len(base)])), "does not fit"),
    ):
        assert sentence in refused(client, commit, pack(base, delta))


def test_trees_that_name_each_other_do_not_unfold_into_millions_of_files(client):
    level, things = blob, [blob]
    for _ in range(8):
        mode = FILE if level is blob else FOLDER
        level = tree_of(*((b"%02d" % number, mode, level) for number in range(10)))
        things.append(level)
    commit = commit_of(level)
    assert "more than 1000000 files" in refused(client, commit, pack_of(*things, commit))


def test_a_path_that_is_too_deep_is_refused(client):
    level, things = tree_of((b"x", FILE, blob)), [blob]
    for _ in range(1000):
        things.append(level)
        level = tree_of((b"d", FOLDER, level))
    commit = commit_of(level)
    assert "a path over 1024 bytes" in refused(client, commit, pack_of(*things, level, commit))


def test_a_commit_or_tag_with_a_date_or_author_that_nothing_can_show_is_refused(client):
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree, at=10**15)
    assert "date" in refused(client, commit, pack_of(blob, tree, commit))
    for raw in (
        b"tree %s\n\nm" % tree.id,
        b"tree %s\nauthor a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n" % tree.id,
        b"tree %s\nauthor a 1 +0000\ncommitter a <a@b> 1 +0000\n\nm" % tree.id,
        b"tree x\nauthor a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n\nm",
        b"tree %s\nauthor a <a@b> x +0000\ncommitter a <a@b> 1 +0000\n\nm" % tree.id,
        b"junk",
        b"",
    ):
        bad = Commit()
        oid = hashlib.sha1(b"commit %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
        bad = type("Bad", (), {"id": oid.encode()})
        assert refused(client, bad, pack(entry(3, b"content"), entry(2, tree.as_raw_string()), entry(1, raw)))


def test_a_tag_must_lead_to_a_commit_and_a_branch_must_not_be_a_tag(client):
    tree = tree_of((b"x", FILE, blob))
    commit, tag = commit_of(tree), Tag()
    tag.name, tag.message, tag.tagger, tag.tag_time, tag.tag_timezone = b"t", b"m", b"a <a@b>", 1, 0
    tag.object = (Commit, commit.id)
    assert "not at a tag" in refused(client, tag, pack_of(blob, tree, commit, tag))
    tag.object = (Tree, tree.id)
    answer = push(client, tag, pack_of(blob, tree, tag), ref="refs/tags/evil")
    assert b"A ref leads to a commit" in answer.content


def test_a_form_of_another_site_cannot_push(client):
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree)
    line = f"{NOTHING} {commit.id.decode()} refs/heads/evil\0report-status".encode()
    body = b"%04x%s0000" % (len(line) + 4, line) + pack_of(blob, tree, commit)
    assert post(client, body, kind="text/plain").status_code == 400


def test_a_ref_that_moved_meanwhile_is_not_overwritten(client):
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree)
    answer = push(client, commit, pack_of(blob, tree, commit), ref="refs/heads/main", old="1" * 40)
    assert b"ng refs/heads/main The ref was changed" in answer.content


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    where=st.integers(0, 400),
    change=st.binary(max_size=6),
    fix=st.booleans(),
    head=st.sampled_from([b"", b"0000", b"x"]),
)
def test_no_change_of_a_push_makes_the_server_stumble(client, where, change, fix, head):
    tree = tree_of((b"x", FILE, blob))
    commit = commit_of(tree, at=1)
    content = bytearray(pack_of(blob, tree, commit))
    content[where : where + len(change)] = change
    if fix:
        content[-20:] = hashlib.sha1(content[:-20], usedforsecurity=False).digest()
    answer = push(client, commit, head + bytes(content), ref="refs/tags/a..b")
    assert answer.status_code < 500
    assert post(client, head + bytes(content)).status_code < 500


@given(content=st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_are_a_pack_or_refused(tmp_path_factory, content):
    from dulwich.object_store import DiskObjectStore

    from hub_moe.hubserver.store.errors import InvalidInputError
    from hub_moe.hubserver.store.objects import Objects
    from hub_moe.hubserver.store.pushed import check_object
    from hub_moe.hubserver.store.unpacking import PackReader

    folder = tmp_path_factory.mktemp("objects")
    body = b"PACK\0\0\0\2\0\0\0\1" + content
    whole = body + hashlib.sha1(body, usedforsecurity=False).digest()
    objects = Objects(folder, DiskObjectStore(folder))
    try:
        PackReader(io.BytesIO(whole), objects, check_object).read()
    except InvalidInputError:
        objects.discard()
