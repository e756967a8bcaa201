"""The directory's frames: they survive the trip, and nonsense is refused in words."""

from __future__ import annotations

import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.engines import wire
from antiphon.engines.wire import LinkFaultKind, WireError

INTS = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[object, st.SearchStrategy[object]] = {
    int: INTS,
    str: st.text(max_size=20),
    bytes: st.binary(max_size=40),
    float: st.floats(),
    bool: st.booleans(),
    LinkFaultKind: st.sampled_from(typing.get_args(LinkFaultKind)),
    tuple[int, ...]: st.lists(INTS, max_size=5).map(tuple),
    tuple[str, ...]: st.lists(st.text(max_size=9), max_size=3).map(tuple),
    tuple[bytes, ...]: st.lists(st.binary(max_size=32), max_size=5).map(tuple),
}


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[object]:
    """Any value of a message type."""
    return st.builds(kind, **{field.name: VALUES[field.type] for field in msgspec.structs.fields(kind)})


VALUES[wire.Hello] = structs(wire.Hello)
FRAMES = st.one_of([structs(kind) for kind in wire.Frame.__args__])


@given(frame=FRAMES)
def test_every_frame_survives_the_trip(frame: wire.Frame) -> None:
    """decode(encode(frame)) is the frame, and the prefix announces the body's length."""
    data = wire.encode(frame)
    assert wire.body_length(data[:4]) == len(data) - 4
    decoded = wire.decode(data[4:])
    # NaN differs from itself: compare what would be sent.
    assert type(decoded) is type(frame) and wire.encode(decoded) == data


@given(body=st.binary(max_size=200))
def test_random_bytes_never_escape_as_other_errors(body: bytes) -> None:
    """Whatever a peer sends is a frame or a WireError."""
    try:
        wire.decode(body)
    except WireError as error:
        assert str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "no_such_frame"}),
        msgspec.msgpack.encode({"type": "found"}),
        msgspec.msgpack.encode({"type": "found", "pages": "three"}),
        msgspec.msgpack.encode({"type": "found", "pages": 3, "extra": 1}),
        wire.encode(wire.Found(3))[4:] + b"\x00",
    ],
)
def test_unreadable_bodies_are_wire_errors(body: bytes) -> None:
    """Empty, not msgpack, unknown tag, missing, mistyped or unknown field, trailing bytes."""
    with pytest.raises(WireError, match="unreadable frame"):
        wire.decode(body)


def test_frames_over_the_limit_are_refused_on_both_sides() -> None:
    """Neither do we send them, nor do we believe a prefix that announces one."""
    with pytest.raises(WireError, match="over the limit"):
        wire.encode(wire.Touch(bytes(wire.MAX_FRAME_BYTES)))
    with pytest.raises(WireError, match="over the limit"):
        wire.body_length((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert wire.body_length(wire.MAX_FRAME_BYTES.to_bytes(4, "big")) == wire.MAX_FRAME_BYTES


def test_macs_bind_key_nonces_and_direction() -> None:
    """A MAC changes with the key, either nonce, and the side that made it: no replay, no reflection."""
    macs = {
        wire.client_mac(b"key", b"s", b"c"),
        wire.server_mac(b"key", b"s", b"c"),
        wire.client_mac(b"other", b"s", b"c"),
        wire.client_mac(b"key", b"t", b"c"),
        wire.client_mac(b"key", b"s", b"d"),
        wire.server_mac(b"key", b"c", b"s"),
    }
    assert len(macs) == 6 and all(len(mac) == 32 for mac in macs)


def test_a_new_field_of_hello_is_ignored() -> None:
    """Hello may grow: an older reader skips what it does not know."""
    hello = wire.Hello("e", "i", "m", "r", "float32", 16, 64, "x", 1, 1, 0, 1, ("a:1",), "virtual")
    fields = msgspec.to_builtins(hello) | {"new_field": 1}
    assert msgspec.convert(fields, wire.Hello) == hello
