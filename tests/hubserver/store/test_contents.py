"""Large contents as whole files and as recipes over xorbs: the same from outside."""

import hashlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_moe.hubserver.store import Store, xet, xorbs
from hub_moe.hubserver.store.check import find_faults
from hub_moe.hubserver.store.commits import AddLargeFile
from hub_moe.hubserver.store.errors import InvalidInputError, NotFoundError, TooLargeError
from hub_moe.hubserver.store.gc import collect
from hub_moe.hubserver.store.shards import Term, parse_shard
from hub_moe.hubserver.store.xorb_format import MAX_CHUNK_BYTES, XorbReader, unpack_run

from ..xet_by_hand import File, Xorb, pack_chunk, pack_shard

CHANCE = random.Random(0)
CHUNKS = [CHANCE.randbytes(CHANCE.randint(1, 3000)) for _ in range(40)] + [b"a" * MAX_CHUNK_BYTES, b"b" * 4097]
ONE, OTHER = Xorb(CHUNKS[:20]), Xorb(CHUNKS[20:], schemes=(2,))
FILE = File([(ONE, 0, 20), (OTHER, 3, 22), (ONE, 5, 9), (OTHER, 0, 3)])
LARGE = Xorb([bytes([number]) * 50_000 for number in range(4)], schemes=(0,))
fixture_is_reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def add_xorb(store, xorb, *, body=None, name=None):
    with store.xorbs.receive(name or xorb.name) as incoming:
        incoming.write(xorb.body if body is None else body)
        incoming.finish()


def add_shard(store, repo, shard):
    for file in parse_shard(shard):
        list(store.xet.add_file(repo.uid, file))


@pytest.fixture
def filled(store, repo):
    add_xorb(store, ONE)
    add_xorb(store, OTHER)
    return store


@pytest.fixture
def kept(filled, repo):
    add_shard(filled, repo, pack_shard(FILE))
    return filled


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


@fixture_is_reused
@given(start=st.integers(0, len(FILE.content) + 5), length=st.integers(0, len(FILE.content)))
def test_any_range_of_a_recipe_is_read_as_it_was_written(kept, start, length):
    read = b"".join(kept.contents.read(sha256_of(FILE.content), start, start + length))
    assert read == FILE.content[start : start + length]


def test_an_uploaded_file_takes_the_room_of_its_xorbs_and_no_more(kept):
    stored = sum(path.stat().st_size for path in kept.root.rglob("*") if path.is_file() and "xorbs" in path.parts)
    assert stored < (len(ONE.body) + len(OTHER.body)) + 48 * (len(CHUNKS) + 2)
    assert list(kept.contents.blobs.all()) == []
    assert list(kept.contents.all()) == [sha256_of(FILE.content)]
    assert kept.contents.size_bytes(sha256_of(FILE.content)) == len(FILE.content)


def test_chunks_that_come_again_packed_in_another_way_change_nothing_for_who_reads_them(store, repo):
    file, again = File([(LARGE, 0, 4)]), Xorb(LARGE.chunks, schemes=(1,))
    late = store.xorbs.receive(again.name)  # begun before anybody has the xorb
    add_xorb(store, LARGE)
    add_shard(store, repo, pack_shard(file))
    place = store.xet.locate(LARGE.name, 1, 4)
    with late:
        late.write(again.body)
        late.finish()
    assert store.xet.locate(LARGE.name, 1, 4) == place
    assert store.xorbs.path(LARGE.name).read_bytes().startswith(LARGE.body)
    assert b"".join(store.contents.read(sha256_of(file.content))) == file.content
    assert list(store.contents.blobs.incoming.iterdir()) == []


def test_a_xorb_that_was_deleted_by_another_process_and_came_again_is_read_by_its_own_index(store, repo):
    file, again = File([(LARGE, 0, 4)]), Xorb(LARGE.chunks, schemes=(1,))
    add_xorb(store, LARGE)
    add_shard(store, repo, pack_shard(file))
    store.xorbs.path(LARGE.name).unlink()
    add_xorb(store, again)
    assert b"".join(store.contents.read(sha256_of(file.content))) == file.content
    assert store.xet.locate(LARGE.name, 0, 4) == (0, len(again.body) - 1)


def test_an_empty_file_has_a_recipe_without_terms(store, repo):
    empty = File([])
    add_shard(store, repo, pack_shard(empty))
    assert empty.true_name == "0" * 64
    assert b"".join(store.contents.read(sha256_of(b""))) == b""


def test_what_came_both_ways_is_kept_once(kept, repo, alice):
    sha256 = sha256_of(FILE.content)
    kept.contents.store([FILE.content], sha256=sha256, size_bytes=len(FILE.content))
    assert list(kept.contents.blobs.all()) == []
    other = File([(ONE, 1, 4)])
    kept.contents.store([other.content], sha256=sha256_of(other.content), size_bytes=len(other.content))
    add_shard(kept, repo, pack_shard(other))
    large = AddLargeFile("other.bin", sha256_of(other.content))
    kept.commits.commit(repo, [large], revision="main", who=alice, message="m")
    collect(kept, older_than_s=-1)
    assert list(kept.contents.blobs.all()) == []
    assert b"".join(kept.contents.read(sha256_of(other.content))) == other.content


def test_a_content_sent_over_http_must_be_true_even_if_it_is_here_already(kept):
    with pytest.raises(InvalidInputError, match="sha256"):
        kept.contents.store([b"false"], sha256=sha256_of(FILE.content), size_bytes=5)


def test_a_recipe_is_committed_read_back_and_found_whole(kept, repo, alice):
    sha256 = sha256_of(FILE.content)
    kept.commits.commit(repo, [AddLargeFile("w.bin", sha256)], revision="main", who=alice, message="m")
    with kept.repos.open(repo) as git:
        facts = kept.files.find(git, git.resolve("main"), "w.bin")
        assert kept.files.read(git, facts, limit_bytes=100) == FILE.content[:100]
    assert list(find_faults(kept)) == []


def test_check_finds_a_damaged_and_a_missing_xorb(kept):
    damaged, missing = kept.xorbs.path(ONE.name), kept.xorbs.path(OTHER.name)
    body = bytearray(damaged.read_bytes())
    body[20] ^= 1
    damaged.write_bytes(body)
    missing.unlink()
    faults = "\n".join(find_faults(kept))
    assert f"xorb {ONE.name}: it is damaged" in faults
    assert f"The xorb {OTHER.name} has not been uploaded" in faults


@pytest.mark.parametrize("length", [0, 10, 300])
def test_check_finds_a_xorb_whose_index_is_cut(kept, length):
    path = kept.xorbs.path(ONE.name)
    path.write_bytes(path.read_bytes()[:length])
    with Store(kept.root) as again:
        assert any(ONE.name in fault for fault in find_faults(again))


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (Term(ONE.name, 5, 7, 6), "has no chunks"),
        (Term(ONE.name, 5, 0, 21), "has no chunks"),
        (Term(ONE.name, 5, 0, 20), "bytes, not 5"),
        (ONE.term(0, 2), "verification entry for the xorb .* is wrong"),
    ],
)
def test_who_has_a_xorb_already_is_told_what_is_false_about_a_term_of_it(kept, repo, term, said):
    with pytest.raises(InvalidInputError, match=said):
        add_shard(kept, repo, pack_shard(File([(ONE, 0, 1)], terms=[term])))


@pytest.mark.parametrize(
    ("false", "said"),
    [
        ({"sha256": "0" * 64}, "sha256"),
        ({"name": "0" * 64}, "Xet hash"),
        ({"proofs": [bytes(32)] * 4}, "verification entry"),
        ({"terms": [ONE.term(0, 20)] * 4}, "verification entry"),
        ({"terms": [Xorb([b"never sent"]).term()] * 4}, "is not here"),
        ({"terms": [Term(ONE.name, 5, 0, 21)] * 4}, "verification entry"),
        ({"flags": 1 << 30}, "verification entries"),
        ({"flags": 1 << 31}, "no sha256"),
        ({"count": 4_000_000_000}, "cut short"),
    ],
)
def test_a_false_shard_is_refused_and_nothing_becomes_visible(filled, repo, false, said):
    with pytest.raises(InvalidInputError, match=said):
        add_shard(filled, repo, pack_shard(FILE.but(**false)))
    assert list(filled.contents.all()) == []
    add_shard(filled, repo, pack_shard(FILE))


def test_a_known_file_under_a_false_sha256_is_refused(kept, repo):
    with pytest.raises(InvalidInputError, match="sha256"):
        add_shard(kept, repo, pack_shard(FILE.but(sha256="0" * 64)))


def test_a_xorb_under_a_false_name_is_refused_and_leaves_nothing(store):
    with pytest.raises(InvalidInputError, match="have the hash"):
        add_xorb(store, ONE, name=OTHER.name)
    assert list(store.xorbs.all()) == []
    assert list(store.contents.blobs.incoming.iterdir()) == []


@fixture_is_reused
@given(place=st.integers(0, len(ONE.body) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_xorb_that_is_changed_anywhere_is_refused(store, place, bit, cut):
    body = bytearray(ONE.body)
    if cut:
        del body[place:]
    else:
        body[place] ^= 1 << bit
    with pytest.raises(InvalidInputError):
        add_xorb(store, ONE, body=bytes(body))
    assert list(store.xorbs.all()) == []


@fixture_is_reused
@given(place=st.integers(0, len(pack_shard(FILE)) - 1), bit=st.integers(0, 7), cut=st.booleans())
def test_a_shard_that_is_changed_anywhere_says_the_truth_or_is_refused(filled, repo, place, bit, cut):
    shard = bytearray(pack_shard(FILE))
    if cut:
        del shard[place:]
    else:
        shard[place] ^= 1 << bit
    try:
        add_shard(filled, repo, bytes(shard))
    except InvalidInputError:
        return
    assert list(filled.contents.all()) in ([], [sha256_of(FILE.content)])


@given(st.integers(100, 5000))
def test_a_xorb_may_arrive_in_pieces_of_any_size(size):
    reader = XorbReader()
    for start in range(0, len(ONE.body), size):
        reader.feed(ONE.body[start : start + size])
    reader.finish()
    assert len(reader.index) == len(ONE.chunks)


@given(st.binary(max_size=60))
def test_any_bytes_after_the_clients_own_footer_starts_are_ignored(rest):
    reader = XorbReader()
    reader.feed(ONE.body + b"XETBLOB\x00" + rest)
    reader.finish()
    assert reader.index.ends[-1] == len(ONE.body)


@pytest.mark.parametrize("size", [0, MAX_CHUNK_BYTES + 1])
def test_a_chunk_has_1_to_131072_bytes(size):
    with pytest.raises(InvalidInputError, match="malformed"):
        XorbReader().feed(pack_chunk(bytes(size), 1))


def test_a_chunk_that_unpacks_to_more_than_it_says_is_refused():
    bomb = bytearray(pack_chunk(bytes(MAX_CHUNK_BYTES), 1))
    bomb[5:8] = (5).to_bytes(3, "little")
    with pytest.raises(InvalidInputError, match="not the 5 bytes"):
        unpack_run(bytes(bomb), size_bytes=5)


def test_a_xorb_has_a_largest_size(store, monkeypatch):
    monkeypatch.setattr(xorbs, "MAX_XORB_BYTES", 100)
    with pytest.raises(TooLargeError):
        add_xorb(store, ONE)


def test_few_indexes_are_remembered(kept, monkeypatch):
    monkeypatch.setattr(xorbs, "_MAX_CACHED_CHUNKS", len(ONE.chunks))
    with Store(kept.root) as again:
        again.xorbs.index(OTHER.name)
        again.xorbs.index(ONE.name)
        assert list(again.xorbs._indexes) == [ONE.name]
        assert b"".join(again.contents.read(sha256_of(FILE.content))) == FILE.content


def test_a_content_that_is_nowhere_is_not_found(store):
    with pytest.raises(NotFoundError):
        store.contents.read("0" * 64)


TINY = Xorb([b"x"] * 3000)
WORK = [
    ([(TINY, 0, 3000)] * 40, {}, "too many chunks"),
    ([(LARGE, 0, 4)] * 9, {}, "repeat"),
    ([(LARGE, 0, 4), (LARGE, 0, 3), (LARGE, 0, 2), (LARGE, 1, 4), (LARGE, 1, 3), (LARGE, 2, 4)] * 2, {}, "repeat"),
    ([(TINY, 0, 3000)] * 3, {"terms": [TINY.term(), Term(TINY.name, 1 << 31, 0, 3000)]}, "not here"),
    ([(TINY, 0, 3000)] * 3, {"terms": [TINY.term(), Term(TINY.name, 3000, 3000, 0)]}, "not here"),
    ([(LARGE, 0, 4)] * 4, {}, None),
    ([(LARGE, 0, 1), (LARGE, 1, 2), (LARGE, 2, 3), (LARGE, 3, 4)] * 4, {}, None),
    ([(TINY, 0, 8)], {}, None),
]


@pytest.mark.parametrize(("runs", "false", "said"), WORK)
def test_a_small_shard_cannot_ask_for_the_work_of_a_large_upload(store, repo, monkeypatch, runs, false, said):
    monkeypatch.setattr(xet, "_REPEATED_BYTES", 10_000)
    add_xorb(store, TINY)
    add_xorb(store, LARGE)
    files = parse_shard(pack_shard(File(runs[: len(runs) // 2]), File(runs[len(runs) // 2 :], **false)))
    if said is None:
        list(store.xet.add_files(repo.uid, files))
        assert all(store.contents.size_bytes(file.sha256) == file.size_bytes for file in files)
        return
    steps = store.xet.add_files(repo.uid, files)
    with pytest.raises((TooLargeError, InvalidInputError), match=said):
        next(steps)  # before anything was read
