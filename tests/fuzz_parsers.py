"""What parsers of the network may be given, and what they may do: answer, or raise their own error.

`python -m tests.fuzz_parsers --seed N --examples N` runs many more inputs than the test suite does.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from antiphon.engines import wire
from antiphon.engines.base import EngineError, GenerateRequest
from antiphon.engines.handshake import DirectoryError, check_hello
from antiphon.engines.registry import parse_record
from antiphon.engines.sse import SseError, SseParser
from antiphon.engines.stream import AnswerReader
from antiphon.engines.whole_answers import read_load, read_prefill
from antiphon.scheduler import api_keys, hint_headers
from antiphon.scheduler.conversation import Conversation, Entry
from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway.messages import parse_count_request, parse_messages_request
from antiphon.scheduler.gateway.requests import parse_chat, parse_completion
from antiphon.scheduler.gateway.responses import parse_response_request
from antiphon.scheduler.token_log import HistoryLost, _replayed

SLOWEST_S = 2.0
"""For one input; a parser that takes longer hangs, as far as a client is concerned."""

HELLO = wire.Hello(
    "e", "i", "m", "r", "float32", 16, 64, "x", 9, 9, 0, 1, ("a:1",), "nixl", "n", b"m", 4096, 64
)
HASH = bytes(range(32))
FRAMES: tuple[wire.Frame, ...] = (
    wire.Challenge(1, HASH), wire.Auth("p", HASH, HASH), wire.Welcome(HASH, HELLO), wire.Touch(HASH),
    wire.Failure("busy", "no"), wire.Lookup((HASH, HASH)), wire.Reserve("p", "i", (HASH,), 1.0, 0.5),
    wire.Reserved(1, (1, 2), (3, 4)), wire.Prefetch("h:1", "i", HASH, (HASH,), 1.0), wire.Confirm(3),
    wire.Chain(HASH),
    wire.ChainPages(b"", (HASH,)), wire.Prefetched(1, 1, 4096, 0.1, ""), wire.StatsReply(*range(11)),
    wire.LinkFault("slow", 0.1),
)  # fmt: skip
CHAT: dict[str, Any] = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto", "session": {"id": "s", "slo": {"ttft_ms": 5}}, "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"}, "stop": ["x"], "seed": 3, "top_logprobs": 2, "logprobs": True,
}  # fmt: skip
LOAD = {
    "num_running_reqs": 1, "num_waiting_reqs": 0, "num_waiting_uncached_tokens": 0, "num_used_tokens": 5,
    "max_total_num_tokens": 100,
}  # fmt: skip
PREFILLED = {"prompt_tokens": 3, "cached_tokens": 1, "finish_reason": {"type": "length"}}
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}
ENTRY = Entry(
    0,
    0,
    bytes(8),
    bytes(4),
    b'[{"role":"user","content":"x"}]',
    b'{"role":"assistant"}',
    b"",
    b"t",
    "m",
    1,
    True,
)
RECORD = {
    "engine_id": "e", "url": "http://127.0.0.1:1", "pool": "decode", "incarnation": "i",
    "kv_addresses": ["127.0.0.1:2"], "chunk_tokens": 512,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    seeds: tuple[bytes, ...]
    """Valid inputs."""
    parse: Callable[[bytes], object]
    own: tuple[type[Exception], ...]
    """What it may raise."""
    msgpack: bool = False


def _json(*values: Any) -> tuple[bytes, ...]:
    return tuple(msgspec.json.encode(value) for value in values)


def _reader(path: str, stream: bytes) -> None:
    """A whole stream: events, then what each means."""
    reader = AnswerReader(GenerateRequest(path, [1], "r", "s", {"n": 1}, None), "engine e")
    for event in SseParser().feed(stream):
        chunk = reader.read(event)
        assert chunk is None or all(0 <= token < 2**32 for token in chunk.token_ids)


def _events(*values: Any) -> bytes:
    return (
        b"".join(b"data: " + msgspec.json.encode(value) + b"\n\n" for value in values) + b"data: [DONE]\n\n"
    )


def _hello(raw: bytes) -> None:
    try:
        hello = msgspec.json.decode(raw, type=wire.Hello)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DirectoryError("broken", str(error)) from error
    check_hello(hello)
    assert hello.page_bytes // hello.page_size_tokens * hello.world_size < 2**63


def _frame(raw: bytes) -> None:
    if len(raw) >= 4:
        assert wire.body_length(raw[:4]) <= wire.MAX_FRAME_BYTES
    wire.decode(raw[4:])


def _sse(raw: bytes) -> None:
    """Whatever the chunks, the events are the same."""
    whole = SseParser().feed(raw)
    parser, pieces = SseParser(), []
    for start in range(0, len(raw), 7):
        pieces += parser.feed(raw[start : start + 7])
    assert pieces == whole


def _headers(raw: bytes) -> None:
    name, _, value = raw.decode("latin-1").partition("\n")
    hint_headers.ours({"x-session-hints": value, "x-session-ttl": name}, [])
    hint_headers.of_peers({header: value for header, *_ in hint_headers.PEER_HEADERS})


COMPLETION_CHUNK = {
    "choices": [{"index": 0, "text": "a", "token_ids": [5], "finish_reason": "stop"}],
    "usage": USAGE,
}
CHAT_CHUNK = {
    "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}], "usage": USAGE,
    "sglext": {"output_ids": [[5, 6]]},
}  # fmt: skip
ERROR_CHUNK = {"error": {"code": 503, "message": "m"}}
TARGETS = (
    Target("frame", tuple(wire.encode(frame) for frame in FRAMES), _frame, (wire.WireError,), msgpack=True),
    Target("hello", _json(HELLO), _hello, (DirectoryError,)),
    Target("sse", (_events(CHAT_CHUNK), b": x\r\nevent: a\rdata\n\n"), _sse, (SseError,)),
    Target("completion stream", (_events(COMPLETION_CHUNK), _events(ERROR_CHUNK)),
           lambda raw: _reader("/v1/completions", raw), (EngineError, SseError)),
    Target("chat stream", (_events(CHAT_CHUNK), _events(ERROR_CHUNK)),
           lambda raw: _reader("/v1/chat/completions", raw), (EngineError, SseError)),
    Target("loads", _json({"loads": [LOAD, LOAD]}), read_load, (ValueError,)),
    Target("prefill", _json({"meta_info": PREFILLED}), read_prefill, (ValueError,)),
    Target("record", _json(RECORD), parse_record, (ValueError,)),
    Target("chat", _json(CHAT), parse_chat, (ApiError,)),
    Target("completion", _json({"model": "m", "prompt": [1, 2]}, {"model": "m", "prompt": "x", "stop": "y"}),
           parse_completion, (ApiError,)),
    Target("messages", _json({"model": "m", "max_tokens": 5, "messages": CHAT["messages"]}),
           lambda raw: (parse_messages_request(raw), parse_count_request(raw)), (ApiError,)),
    Target("responses", _json({"model": "m", "input": "x"}), parse_response_request, (ApiError,)),
    Target("hints", (b'5\nttft_ms=5, class="a b", final, osl=3;q=1',), _headers, (hint_headers.BadHint,)),
    Target("api key", _json({"name": "n", "tenant": "t", "limits": {"sessions": 1}}),
           lambda raw: api_keys._decoded(raw.decode("latin-1")), ()),
    Target("token log", (msgspec.msgpack.encode(ENTRY),),
           lambda raw: _replayed(Conversation("t", "s"), [raw, raw]), (HistoryLost,), msgpack=True),
)  # fmt: skip

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, -(2**63), 1e308, -0.5, "", "\x00", "x" * 5000, "\u20ac",
    [], {}, b"", [[]], {"a": {}}, "5", "9" * 400,
)  # fmt: skip


def mutated(target: Target, dice: random.Random) -> bytes:
    """A valid input with something wrong: in its structure, or in its bytes; or only bytes."""
    raw = dice.choice(target.seeds)
    kind = dice.random()
    if kind < 0.1:
        return dice.randbytes(dice.randrange(200))
    if kind < 0.2:
        depth = dice.choice((50, 500, 5000, 200_000))
        if target.msgpack:
            return raw[:4] + b"\x91" * depth
        opening = dice.choice((b"[", b'{"a":', b'{"choices":[', b'{"loads":[', b'{"messages":['))
        return dice.choice((b"", b"data: ")) + opening * depth + dice.choice((b"", b"\n\n"))
    if kind < 0.7:
        changed = _structure(target, raw, dice)
        if changed is not None:
            return changed
    edited = bytearray(raw)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(edited) + 1)
        act = dice.randrange(4)
        if act == 0:
            edited[at:at] = dice.randbytes(dice.randint(1, 8))
        elif act == 1:
            del edited[at : at + dice.randint(1, 8)]
        elif act == 2 and at < len(edited):
            edited[at] ^= 1 << dice.randrange(8)
        else:
            other = dice.choice(target.seeds)
            edited[at:at] = other[: dice.randrange(len(other) + 1)]
    return bytes(edited)


def _structure(target: Target, raw: bytes, dice: random.Random) -> bytes | None:
    """One value somewhere inside replaced by an odd one; None where the input is no tree."""
    head, body, tail = b"", raw, b""
    if target.msgpack and target.name == "frame":
        head, body = raw[:4], raw[4:]
    elif raw.startswith(b"data: "):
        head, body, tail = b"data: ", *raw[6:].split(b"\n\n", 1)
        tail = b"\n\n" + tail
    codec = msgspec.msgpack if target.msgpack else msgspec.json
    try:
        tree = codec.decode(body)
    except msgspec.MsgspecError:
        return None
    try:
        body = bytes(codec.encode(_swapped(tree, dice)))
        return head + body + tail
    except (msgspec.MsgspecError, OverflowError, TypeError, UnicodeEncodeError):
        return None


def _swapped(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.85:
        name = dice.choice(list(value))
        if dice.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return value | {name: _swapped(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        return [*value[:at], _swapped(value[at], dice), *value[at + 1 :], *value[: dice.choice((0, 0, 1))]]
    return dice.choice(ODD)


def tried(target: Target, raw: bytes) -> None:
    """Fails unless the parser answers, or raises its own error, in time."""
    began = time.process_time()
    try:
        target.parse(raw)
    except target.own as error:
        assert str(error) is not None
    except Exception as error:
        raise AssertionError(f"{target.name}: {raw[:300]!r} raised {error!r}") from error
    spent_s = time.process_time() - began
    assert spent_s < SLOWEST_S, f"{target.name}: {raw[:300]!r} took {spent_s:.1f} s"


def main() -> int:
    logging.disable(logging.WARNING)  # each bad key of the ledger is said
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=20_000)
    options = parser.parse_args()
    for target in TARGETS:
        dice = random.Random(f"{options.seed} {target.name}")
        for _ in range(options.examples):
            tried(target, mutated(target, dice))
        print(
            f"{target.name}: {options.examples} inputs, seed {options.seed}: only its own errors", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
