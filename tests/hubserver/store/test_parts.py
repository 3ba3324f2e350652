"""Uploads in parts: in any order, again, or cut short, they are the promised content or nothing."""

import hashlib
import random
import secrets

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub_moe.hubserver.store.errors import ConflictError, InvalidInputError, NotFoundError, TooLargeError

CONTENT = random.Random(0).randbytes(1050)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTS = 11
fixture_is_reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def send(store, name, number, content=None, *, finish=True):
    offset = (number - 1) * 100
    right = CONTENT[offset : offset + 100]
    with store.parts.receive(name, number, offset=offset, size_bytes=len(right)) as part:
        part.write(right if content is None else content)
        if finish:
            part.finish()


def complete(store, name):
    store.parts.complete(name, parts=PARTS, sha256=SHA256, size_bytes=len(CONTENT))


@fixture_is_reused
@given(order=st.permutations(range(1, PARTS + 1)), again=st.lists(st.integers(1, PARTS), max_size=3))
def test_parts_may_come_in_any_order_and_again(store, order, again):
    name = secrets.token_hex(32)
    for number in order:
        send(store, name, number, bytes(min(100, len(CONTENT) - (number - 1) * 100)) if number in again else None)
    for number in again:
        send(store, name, number)
    complete(store, name)
    assert b"".join(store.contents.read(SHA256)) == CONTENT
    assert list(store.contents.blobs.incoming.iterdir()) == []
    store.contents.blobs.delete(SHA256)


def test_a_part_that_is_missing_cut_or_too_long_is_said_so(store):
    name = "0" * 64
    for number in range(2, PARTS + 1):
        send(store, name, number)
    with pytest.raises(NotFoundError, match="Part 1 of 11"):
        complete(store, name)
    with pytest.raises(InvalidInputError, match="Got 5 bytes of the 100"):
        send(store, name, 1, b"short")
    with pytest.raises(TooLargeError):
        send(store, name, 1, bytes(101))
    with pytest.raises(NotFoundError, match="Part 1 of 11"):
        complete(store, name)
    send(store, name, 1)
    complete(store, name)


def test_a_part_that_is_cut_the_second_time_is_missing_again(store):
    name = "1" * 64
    for number in range(1, PARTS + 1):
        send(store, name, number)
    send(store, name, 3, b"cut", finish=False)
    with pytest.raises(NotFoundError, match="Part 3 of 11"):
        complete(store, name)


def test_parts_of_another_content_are_refused_and_can_be_sent_again(store):
    name = "2" * 64
    for number in range(1, PARTS + 1):
        send(store, name, number, bytes(100) if number == 5 else None)
    with pytest.raises(InvalidInputError, match="sha256"):
        complete(store, name)
    assert store.contents.size_bytes(SHA256) is None
    send(store, name, 5)
    complete(store, name)
    assert store.contents.size_bytes(SHA256) == len(CONTENT)


def test_an_upload_that_was_cleared_away_is_said_to_be_given_up(store):
    name = "3" * 64
    send(store, name, 1)
    next(store.contents.blobs.incoming.iterdir()).unlink()
    with pytest.raises(NotFoundError, match="given up"):
        send(store, name, 2)


def open_part(store, name, number):
    offset = (number - 1) * 100
    return store.parts.receive(name, number, offset=offset, size_bytes=len(CONTENT[offset : offset + 100]))


def test_an_upload_is_complete_only_when_nobody_writes_and_takes_no_part_afterwards(store):
    name = "4" * 64
    with open_part(store, name, 1) as held:
        for number in range(1, PARTS + 1):
            send(store, name, number)
        with pytest.raises(ConflictError, match="Part 1 is still being sent"):
            complete(store, name)
        held.write(CONTENT[:100])
    complete(store, name)
    complete(store, name)
    with pytest.raises(ConflictError, match="is complete"):
        open_part(store, name, 1)
    assert b"".join(store.contents.read(SHA256)) == CONTENT


def test_what_was_hashed_of_one_sender_does_not_vouch_for_what_another_wrote_into_the_same_part(store):
    name = "5" * 64
    with open_part(store, name, 1) as honest, open_part(store, name, 1) as false:
        honest.write(CONTENT[:100])
        false.write(bytes(100))
        honest.finish()
        false.finish()
    for number in range(2, PARTS + 1):
        send(store, name, number)
    with pytest.raises(InvalidInputError, match="sha256"):
        complete(store, name)


def test_what_was_hashed_before_a_part_came_again_does_not_vouch_for_it(store):
    name = "6" * 64
    send(store, name, 1)
    with open_part(store, name, 2) as second:
        second.write(CONTENT[100:200])
        send(store, name, 1, bytes(100))
        second.finish()
    for number in range(3, PARTS + 1):
        send(store, name, number)
    with pytest.raises(InvalidInputError, match="sha256"):
        complete(store, name)
