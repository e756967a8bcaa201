"""Weka: one JSON document a session (cc-traces of kv-cache-tester), its sub-agents nested inside.

A session is the main thread; a sub-agent is a session of its own, `<id>/<n>`, that starts after the main
request before it in the document. What the source does not say:
- Hash ids name whole blocks, so what a request kept is known to a block (64 tokens). A document of which
  some request has more or fewer ids than blocks is a fault: its blocks are not what it says.
- A gap is start-to-start less `api_time`. Where that is absent the gap is too long by the time of the call.
- Nested times may be counted from the document's start or from the sub-agent's: only differences are used.
- The main thread does not wait for its sub-agents; its recorded gap already includes them.
- Tools have no names: a request with a tool's result says `tool`.
- Ids are local to a document. With `share_system`, sessions whose tools and system prompt have the same
  lengths share that prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from antiphon.traces.blocks import count_fault, kept_tokens, shared_tokens
from antiphon.traces.formats import Format, Item, Line, ReadOptions
from antiphon.traces.schema import RoundTrace, Seconds, SessionTrace, SomeTokens, Tokens

DEFAULT_BLOCK_TOKENS = 64
TOOL = "tool"


class _Call(msgspec.Struct, frozen=True):
    t: Seconds
    prompt: SomeTokens = msgspec.field(name="in")
    out: Tokens
    hash_ids: tuple[int, ...]
    input_types: tuple[str, ...] = ()
    api_time: Seconds = 0.0


class _Plain(_Call, frozen=True, tag="n"):
    pass


class _Streamed(_Call, frozen=True, tag="s"):
    pass


class _SubAgent(msgspec.Struct, frozen=True, tag="subagent"):
    requests: tuple[_Plain | _Streamed | _SubAgent, ...] = ()
    """None where the source left them out."""
    tool_tokens: Tokens = 0
    system_tokens: Tokens = 0


class _Document(msgspec.Struct, frozen=True):
    id: str
    requests: tuple[_Plain | _Streamed | _SubAgent, ...]
    block_size: Annotated[int, Meta(ge=1, le=4096)] = DEFAULT_BLOCK_TOKENS
    tool_tokens: Tokens = 0
    system_tokens: Tokens = 0


def _matches(head: dict[str, object]) -> bool:
    return "id" in head and "requests" in head and ("hash_id_scope" in head or "block_size" in head)


def _read(lines: Iterator[Line], options: ReadOptions) -> Iterator[Item]:
    """A line is a whole document. One that has no request of its own is a fault."""
    decoder = msgspec.json.Decoder(_Document)
    for line in lines:
        try:
            document = decoder.decode(line.text)
            fault = _fault(document, document.block_size)
            found = () if fault else tuple(_sessions(document.id, document, document.block_size, options))
        except (msgspec.MsgspecError, RecursionError) as error:
            yield line, str(error)
            continue
        if fault or not found:
            yield line, fault or "requests: holds none of the main thread (type n or s)"
        for session in found:
            yield line, session


def _fault(thread: _Document | _SubAgent, block_tokens: int) -> str | None:
    """The first request whose ids do not go with its length, sub-agents' included."""
    for number, item in enumerate(thread.requests):
        if isinstance(item, _SubAgent):
            fault = _fault(item, block_tokens)
            where = "."
        else:
            fault = count_fault(item.prompt, len(item.hash_ids), block_tokens)
            where = ".hash_ids: "
        if fault:
            return f"requests[{number}]{where}{fault}"
    return None


def _sessions(
    session_id: str,
    thread: _Document | _SubAgent,
    block_tokens: int,
    options: ReadOptions,
    parent: str | None = None,
    after_round: int = 0,
) -> Iterator[SessionTrace]:
    """The thread's session, then those of its sub-agents. Nothing of a sub-agent without requests."""
    calls = [item for item in thread.requests if isinstance(item, _Call)]
    if not calls:
        return
    shared = min(thread.tool_tokens + thread.system_tokens, calls[0].prompt) if options.share_system else 0
    yield SessionTrace(
        session_id=session_id,
        rounds=_rounds(calls, block_tokens),
        parent=parent,
        after_round=after_round,
        shared_prefix=f"weka:{thread.tool_tokens}+{thread.system_tokens}" if shared else "",
        shared_tokens=shared,
    )
    before = number = 0
    for item in thread.requests:
        if isinstance(item, _SubAgent):
            number += 1
            yield from _sessions(
                f"{session_id}/{number}", item, block_tokens, options, parent=session_id, after_round=before
            )
        else:
            before += 1


def _rounds(calls: Sequence[_Call], block_tokens: int) -> tuple[RoundTrace, ...]:
    rounds: list[RoundTrace] = []
    previous: _Call | None = None
    for call in calls:
        kept, gap_s = 0, 0.0
        if previous is not None:
            shared = shared_tokens(previous.hash_ids, call.hash_ids, block_tokens)
            kept = kept_tokens(previous.prompt, max(1, previous.out), shared, block_tokens, call.prompt)
            gap_s = max(0.0, call.t - previous.t - previous.api_time)
        rounds.append(
            RoundTrace(
                prompt_tokens=call.prompt,
                output_tokens=max(1, call.out),
                kept_tokens=kept,
                gap_s=round(gap_s, 6),
                tool=TOOL if "tool_result" in call.input_types else "",
            )
        )
        previous = call
    return tuple(rounds)


FORMAT = Format("weka", _matches, _read, "document")
