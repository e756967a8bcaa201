"""Token logs in a real Valkey: what one replica stores another one reads, or it says that it is lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from antiphon.engines.prompt import Prompt
from antiphon.scheduler.conversation import Conversation, Entry, Said
from antiphon.scheduler.token_log import HistoryLost, LedgerUnavailable, TokenLogs

TTL_S = 60.0
Work = Callable[[TokenLogs, TokenLogs], Coroutine[Any, Any, None]]


def said(
    base: Conversation, new: Sequence[int], output: Sequence[int], text: str = "x", *, keep: int | None = None
) -> Said:
    """A round that goes on from all of `base`, or from its first `keep` tokens, with as many messages."""
    kept = base.prompt if keep is None else (base.kept(keep)[-1].upto if keep else Prompt())
    messages = len(base.messages) if keep is None else (base.kept(keep)[-1].messages if keep else 0)
    prompt = kept.extended(new)
    return Said(
        prompt, prompt.extended(output), len(kept), messages, [{"role": "user", "content": text}],
        {"role": "assistant", "content": text.upper()}, True, b"{}", b"tok", "m", base.round + 1,
    )  # fmt: skip


def same(a: Conversation, b: Conversation) -> bool:
    """All that counts of them."""
    return (
        list(a.prompt) == list(b.prompt)
        and [(p.start, p.end, p.generated, p.messages) for p in a.parts]
        == [(p.start, p.end, p.generated, p.messages) for p in b.parts]
        and (a.messages, a.entries, a.header, a.ancestors) == (b.messages, b.entries, b.header, b.ancestors)
        and (a.options, a.tokenizer, a.model, a.round) == (b.options, b.tokenizer, b.model, b.round)
    )


@asynccontextmanager
async def logs_on(url: str, fleet: str, **options: Any) -> AsyncIterator[TokenLogs]:
    made = TokenLogs(url, fleet=fleet, **options)
    try:
        yield made
    finally:
        await made.close()


def run(url: str, work: Work) -> None:
    """With two replicas' logs in a fleet of their own."""

    async def both() -> None:
        fleet = uuid.uuid4().hex
        async with logs_on(url, fleet) as one, logs_on(url, fleet) as other:
            await work(one, other)

    asyncio.run(both())


def test_a_replica_goes_on_where_another_stopped(valkey_url: str) -> None:
    """Rounds by turns on two replicas: both see the same."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        first = await one.load("t", "s")
        assert not first.entries and not first.parts
        for turn in range(6):
            mine = (one, other)[turn % 2]
            base = await mine.load("t", "s")
            assert base.entries == turn
            after = await mine.add(base, "s", said(base, [turn, 2], [3, 4, 5], f"hi {turn}"), TTL_S)
            assert after.entries == turn + 1 and after.round == turn + 1
        a, b = await one.load("t", "s"), await other.load("t", "s")
        assert same(a, b) and a.prompt[-5:].tolist() == [5, 2, 3, 4, 5]
        assert [m["content"] for m in a.messages[-2:]] == ["hi 5", "HI 5"]
        assert (await one.load("other tenant", "s")).entries == 0

    run(valkey_url, work)


def test_only_what_is_lacking_is_read(valkey_url: str) -> None:
    """A replica that knows the conversation reads no entry again; one that does not reads each once."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "s")
        base = await one.add(base, "s", said(base, range(40_000), [7]), TTL_S)
        reads: list[int] = []
        plain = one._read

        async def counted(*arguments: Any) -> tuple[bytes | None, list[bytes]]:
            header, entries = await plain(*arguments)
            reads.append(sum(map(len, entries)))
            return header, entries

        one._read = counted  # type: ignore[method-assign, assignment]
        assert await one.load("t", "s") is base
        seen = await other.load("t", "s")
        await other.add(seen, "s", said(seen, [1], [2]), TTL_S)
        assert len((await one.load("t", "s")).prompt) == 40_003
        assert len(reads) == 2 and reads[0] == 0 and reads[1] < 300

    run(valkey_url, work)


def test_a_fork_begins_with_its_parents_rounds(valkey_url: str) -> None:
    """Nothing of the parent is copied; it goes on without the fork, and a fork of a fork works too."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "p")
        base = await one.add(base, "p", said(base, range(20_000), [1]), TTL_S)
        child = await one.add(base, "c", said(base, [8], [9]), TTL_S)
        parent = await one.add(base, "p", said(base, [5], [6]), TTL_S)
        grandchild = await one.add(child, "g", said(child, [10], [11]), TTL_S)
        assert child.prompt[-3:].tolist() == [1, 8, 9] and parent.prompt[-3:].tolist() == [1, 5, 6]
        assert grandchild.ancestors == ("c", "p")
        for name, expected in (("p", parent), ("c", child), ("g", grandchild)):
            assert same(await other.load("t", name), expected)
        assert grandchild.stored_bytes < 1000, "the fork stores its own round only"
        assert await one.fork("t", "p", "explicit", TTL_S) and not await one.fork("t", "none", "x", TTL_S)
        explicit = await other.load("t", "explicit")
        assert list(explicit.prompt) == list(parent.prompt) and explicit.ancestors == ("p",)
        await other.add(explicit, "explicit", said(explicit, [3], [4]), TTL_S)
        assert (await one.load("t", "explicit")).prompt[-3:].tolist() == [6, 3, 4]
        await one.delete("t", "p")
        with pytest.raises(HistoryLost, match="fork of session p"):
            await TokenLogsAnew.of(one).load("t", "g")

    run(valkey_url, work)


class TokenLogsAnew:
    """The same replica after a restart: it remembers nothing."""

    @staticmethod
    def of(logs: TokenLogs) -> TokenLogs:
        logs._known.clear()
        logs._known_bytes = 0
        return logs


def test_forks_without_end_are_copied_at_some_depth(valkey_url: str) -> None:
    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "f0")
        base = await one.add(base, "f0", said(base, [0], [1]), TTL_S)
        for depth in range(1, 140):
            base = await one.add(base, f"f{depth}", said(base, [depth], [1]), TTL_S)
            assert len(base.ancestors) <= 64
        assert list((await other.load("t", "f139")).prompt) == list(base.prompt)

    run(valkey_url, work)


def test_what_redis_lost_is_said_to_be_lost(valkey_url: str) -> None:
    """By a replica that saw it; a log begun anew meanwhile is not taken for the old one."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "s")
        base = await one.add(base, "s", said(base, [1], [2]), TTL_S)
        key = one._key("t", "s")
        await one._connection.command("DEL", key)
        with pytest.raises(HistoryLost):
            await one.load("t", "s")
        begun = await other.load("t", "s")
        begun = await other.add(begun, "s", said(begun, [7], [8]), TTL_S)
        begun = await other.add(begun, "s", said(begun, [9], [9]), TTL_S)
        assert same(await one.load("t", "s"), begun)
        lost = await one.add(base, "s", said(base, [3], [4]), TTL_S)
        assert list(lost.prompt) == [1, 2, 3, 4] and [m["content"] for m in lost.messages] == ["x", "X"] * 2
        assert same(await other.load("t", "s"), lost)

    run(valkey_url, work)


def test_two_writers_do_not_mix(valkey_url: str) -> None:
    """Both went on from the same round: the later one's conversation stands, whole."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "s")
        base = await one.add(base, "s", said(base, [1], [2]), TTL_S)
        theirs = await other.load("t", "s")
        await other.add(theirs, "s", said(theirs, [3], [4]), TTL_S)
        mine = await one.add(base, "s", said(base, [5], [6]), TTL_S)
        assert list(mine.prompt) == [1, 2, 5, 6]
        assert same(await other.load("t", "s"), mine)

    run(valkey_url, work)


def test_entries_that_cannot_be_read_are_lost_and_no_bug(valkey_url: str) -> None:
    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "s")
        await one.add(base, "s", said(base, [1], [2]), TTL_S)
        for wrong in (b"\xc1", b"\x90", bytes(200)):
            await one._connection.command("RPUSH", one._key("t", "s"), wrong)
            with pytest.raises(HistoryLost):
                await other.load("t", "s")
            await one._connection.command("RPOP", one._key("t", "s"))

    run(valkey_url, work)


def test_it_lives_as_long_as_it_is_told(valkey_url: str) -> None:
    """A fork's rounds keep what it begins with alive."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        base = await one.load("t", "p")
        base = await one.add(base, "p", said(base, [1], [2]), 30.0)
        assert 29_000 < await one._connection.command("PTTL", one._key("t", "p")) <= 30_000
        await one.add(base, "c", said(base, [1], [2]), 90.0)
        assert 89_000 < await one._connection.command("PTTL", one._key("t", "p")) <= 90_000
        await one.add(base, "d", said(base, [1], [2]), 10.0)
        assert 89_000 < await one._connection.command("PTTL", one._key("t", "p")) <= 90_000

    run(valkey_url, work)


def test_memory_is_bounded(valkey_url: str) -> None:
    """The conversations unused for longest are read again; none is wrong."""

    async def work() -> None:
        async with logs_on(valkey_url, uuid.uuid4().hex, memory_bytes=200_000) as logs:
            ends = {}
            for number in range(30):
                base = await logs.load("t", f"s{number}")
                ends[f"s{number}"] = await logs.add(
                    base, f"s{number}", said(base, range(2000), [number]), TTL_S
                )
                assert logs.known_bytes <= 200_000
            assert 1 < len(logs._known) < 15
            for name, end in ends.items():
                assert same(await logs.load("t", name), end)
                assert logs.known_bytes == sum(size for _, size in logs._known.values())

    asyncio.run(work())


def test_a_list_that_is_mostly_invalid_is_begun_anew(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that rewrites its history every round does not fill the ledger."""
    monkeypatch.setattr("antiphon.scheduler.token_log.REWRITE_BYTES", 20_000)

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        for number in range(40):
            base = await one.load("t", "s")
            await one.add(base, "s", said(base, range(number, number + 500), [1], keep=0), TTL_S)
        size = await one._connection.command("MEMORY", "USAGE", one._key("t", "s"), "SAMPLES", 0)
        assert size < 60_000
        assert (await other.load("t", "s")).prompt[0] == 39

    run(valkey_url, work)


def test_a_ledger_that_is_away_is_said_to_be_away() -> None:
    async def work() -> None:
        async with logs_on("unix:///nowhere/valkey.sock", "f", deadline_s=0.2) as logs:
            with pytest.raises(LedgerUnavailable):
                await logs.load("t", "s")
            with pytest.raises(LedgerUnavailable):
                base = Conversation("t", "s")
                await logs.add(base, "s", said(base, [1], [2]), TTL_S)

    asyncio.run(work())


ROUND = st.tuples(
    st.integers(0, 1),
    st.integers(0, 3),
    st.integers(0, 6),
    st.booleans(),
    st.lists(st.integers(0, 99), max_size=4),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROUND, max_size=10))
def test_any_history_reads_as_it_was_written(valkey_url: str, rounds: list[Any]) -> None:
    """Forks, rewritten histories, restarts, two replicas: ids and parts are those of a plain model."""

    async def work(one: TokenLogs, other: TokenLogs) -> None:
        model: dict[str, list[int]] = {}
        for number, (replica, session, cut, fork, ids) in enumerate(rounds):
            logs, name = (one, other)[replica], f"s{session}"
            base = await logs.load("t", name)
            assert list(base.prompt) == model.get(name, [])
            ends = [0, *(part.end for part in base.parts)]
            keep = ends[-1 - min(cut, len(ends) - 1)]
            target = f"f{number}" if fork else name
            round_ = said(base, ids, [number], f"m{number}", keep=keep)
            after = await logs.add(base, target, round_, TTL_S)
            model[target] = [*model.get(name, [])[:keep], *ids, number]
            assert list(after.prompt) == model[target]
            assert len(after.messages) == after.parts[-1].messages
            if cut == 6:
                TokenLogsAnew.of(logs)
        for name, expected in model.items():
            for logs in (one, other):
                found = await logs.load("t", name)
                assert list(found.prompt) == expected
                assert [p.start for p in found.parts[1:]] == [p.end for p in found.parts[:-1]]

    run(valkey_url, work)


def test_a_wrong_entry_is_refused() -> None:
    base = Conversation("t", "s")
    base = base.add(said(base, [1, 2], [3]).entry(base))
    with pytest.raises(ValueError, match="no part of s ends at token 1"):
        base.add(Entry(1, 0, b"", b"", b"[]", b"{}", b"", b"", "", 1, True))
    with pytest.raises(ValueError, match="no 9 messages"):
        base.add(Entry(3, 9, b"", b"", b"[]", b"{}", b"", b"", "", 1, True))


def test_the_session_has_a_hash_tag_of_its_own(valkey_url: str) -> None:
    """No tenant or id can reach another's log, and a Redis cluster can spread them."""
    logs = TokenLogs(valkey_url, fleet="f")
    slots = set()
    for tenant, name in (("a", "b:c"), ("a:b", "c"), ("a", "}x"), ("a", "b")):
        key = logs._key(tenant, name)
        assert key.count("{") == key.count("}") == 1
        slots.add(key_slot(key.encode()))
    assert len(slots) == 4
