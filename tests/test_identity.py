"""Whose round it is: signals in their order, others' names, parents, and conversations without an id."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from antiphon.scheduler.errors import ApiError
from antiphon.scheduler.gateway.identity import (
    BodySignals,
    Identifier,
    Identity,
    conversation_scope,
    given_request_id,
    identify,
)
from antiphon.scheduler.gateway.message_chain import links
from antiphon.scheduler.hints import SessionFields
from antiphon.scheduler.session_config import SessionConfig
from antiphon.scheduler.session_store import SessionStore
from tests.ledger_helpers import ledger_at

CONFIG = SessionConfig()
TTL_S = 60.0

Message = dict[str, Any]


def body(**fields: Any) -> BodySignals:
    session = SessionFields(fields.pop("id", None), fields.pop("parent_id", None))
    return BodySignals(session, **fields)


def found(
    headers: Mapping[str, str] | None = None, config: SessionConfig = CONFIG, **fields: Any
) -> Identity:
    identity = identify(headers or {}, body(**fields), config)
    assert identity is not None
    return identity


# ---------------------------------------------------------------- what a request names


@pytest.mark.parametrize("bad", ["", "x" * 256, "a b", "a\n", "é", "\x7f"], ids=repr)
def test_a_bad_id_of_ours_is_refused_wherever_it_stands(bad: str) -> None:
    """A session id is 1 to 255 visible ASCII characters; a bad one is never replaced."""
    cases: tuple[tuple[str, dict[str, str], dict[str, Any]], ...] = (
        ("X-Session-ID", {"x-session-id": bad}, {}),
        ("session.id", {}, {"id": bad}),
        ("session_id", {}, {"session_id": bad}),
        ("X-Parent-Session-ID", {"x-parent-session-id": bad, "x-session-id": "s"}, {}),
        ("session.parent_id", {"x-session-id": "s"}, {"parent_id": bad}),
    )
    for param, headers, fields in cases:
        with pytest.raises(ApiError) as caught:
            found(headers, **fields)
        assert (caught.value.status, caught.value.code) == (400, "invalid_session_id")
        assert caught.value.param == param


def test_signals_are_taken_in_their_order() -> None:
    """Ours first, then the aliases in the order of the configuration, then names in the body."""
    headers = {"x-session-id": "own", **{name: f"h-{name}" for name in CONFIG.aliases}}
    fields: dict[str, Any] = {
        "id": "object", "session_id": "field", "litellm_session_id": "litellm", "program_id": "program",
        "nvext": {"session_control": {"session_id": "old-dynamo"}},
        "metadata": {"session_id": "meta", "thread_id": "thread", "conversation_id": "conversation"},
    }  # fmt: skip
    seen = [found(headers, **fields).identified_by]
    del headers["x-session-id"]
    for name in ("id", "session_id"):
        seen.append(found(headers, **fields).identified_by)
        del fields[name]
    for name in CONFIG.aliases:
        identity = found(headers, **fields)
        assert identity.session_id == f"h-{name}"
        seen.append(identity.identified_by)
        del headers[name]
    for name in ("litellm_session_id", "program_id", "nvext"):
        seen.append(found(**fields).identified_by)
        del fields[name]
    for name in ("session_id", "thread_id", "conversation_id"):
        seen.append(found(**fields).identified_by)
        del fields["metadata"][name]
    assert seen == [
        "header:x-session-id", "body:session.id", "body:session_id", *(f"header:{a}" for a in CONFIG.aliases),
        "body:litellm_session_id", "body:program_id", "body:nvext.session_control.session_id",
        "body:metadata.session_id", "body:metadata.thread_id", "body:metadata.conversation_id",
    ]  # fmt: skip
    assert identify({}, body(**fields), CONFIG) is None


@given(st.text(min_size=1, max_size=300))
def test_any_name_of_another_system_is_a_session(name: str) -> None:
    """A good id as it is, anything else by its hash: the same again, and never refused."""
    first, again = found({"session-id": name}), found(metadata={"thread_id": name})
    assert first.session_id == again.session_id == found({"session-id": first.session_id}).session_id
    good = len(name) <= 255 and all("!" <= char <= "~" for char in name)
    assert (first.session_id == name) is good
    assert found({"session-id": name + "x"}).session_id != first.session_id


@pytest.mark.parametrize("nothing", [{"metadata": "text"}, {"metadata": {"thread_id": 7}}, {"nvext": []},
                                     {"nvext": {"session_control": "open"}}, {"program_id": ["x"]},
                                     {"litellm_session_id": ""}], ids=str)  # fmt: skip
def test_what_is_no_name_is_none(nothing: dict[str, Any]) -> None:
    """Fields of other systems may hold anything."""
    assert identify({"session-id": "", "x-session-affinity": ""}, body(**nothing), CONFIG) is None


def test_aliases_are_what_the_configuration_says() -> None:
    """A header of one's own, and none of the others."""
    config = SessionConfig(aliases=("x-run",), parent_aliases=("x-parent-run",))
    identity = found({"x-run": "r", "x-parent-run": "p", "session-id": "other"}, config)
    assert (identity.session_id, identity.parent_id) == ("r", "p")
    assert identify({"session-id": "other"}, body(), config) is None
    for bad in ("X-Run", "x run", ""):
        with pytest.raises(ValueError, match="lower case"):
            SessionConfig(aliases=(bad,))


# ---------------------------------------------------------------- parents


@pytest.mark.parametrize(
    ("headers", "fields", "session_id", "parent_id"),
    [
        ({"x-session-id": "s", "x-parent-session-id": "p"}, {"parent_id": "q"}, "s", "p"),
        ({"x-session-id": "s"}, {"parent_id": "q"}, "s", "q"),
        ({"x-session-id": "s", "x-parent-session-id": "s"}, {}, "s", None),
        ({"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p"}, {}, "s", "p"),
        ({"thread-id": "t", "session-id": "run", "x-codex-parent-thread-id": "p"}, {}, "t", "p"),
        ({"x-claude-code-session-id": "cc"}, {}, "cc", None),
        ({"x-claude-code-session-id": "cc", "x-claude-code-agent-id": "a1"}, {}, "a1", "cc"),
        (
            {
                "x-claude-code-session-id": "cc",
                "x-claude-code-agent-id": "a2",
                "x-claude-code-parent-agent-id": "a1",
            },
            {},
            "a2",
            "a1",
        ),
        ({"x-session-id": "s", "x-dynamo-parent-session-id": "not ours"}, {}, "s", "hashed"),
    ],
    ids=str,
)
def test_parents(
    headers: dict[str, str], fields: dict[str, Any], session_id: str, parent_id: str | None
) -> None:
    """Ours, then those of other systems; of a sub-agent of Claude Code the agent that called it."""
    identity = found(headers, **fields)
    assert identity.session_id == session_id
    if parent_id == "hashed":
        assert identity.parent_id is not None and identity.parent_id.startswith("sess_")
    else:
        assert identity.parent_id == parent_id


def test_few_kinds_for_metrics() -> None:
    """No name that a client or a configuration gives becomes a label."""
    kinds = {
        found({"x-session-id": "s"}).kind, found(id="s").kind, found(session_id="s").kind,
        found({"thread-id": "s"}).kind, found(metadata={"thread_id": "s"}).kind,
        Identity("s", "prefix:fork").kind,
    }  # fmt: skip
    assert kinds == {
        "header:x-session-id", "body:session.id", "body:session_id", "header", "body", "prefix:fork",
    }  # fmt: skip


def test_a_request_id_must_be_fit_for_a_log() -> None:
    """A client's request id is used unless it is empty, long or not visible ASCII."""
    assert given_request_id({"x-request-id": "abc"}) == "abc"
    for bad in ("", "x" * 129, "a b", "é"):
        assert given_request_id({"x-request-id": bad}) is None


# ---------------------------------------------------------------- conversations without an id

SYSTEM: Message = {"role": "system", "content": "be brief"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Client:
    """Talks to an `Identifier` as the gateway does: asks, answers, remembers."""

    def __init__(self, store: SessionStore, config: SessionConfig = CONFIG, tenant: str = "t") -> None:
        self.kinds: list[str] = []
        self.failed = 0
        self.tenant = tenant
        self._store = store
        self._identifier = Identifier(config, store, self.kinds.append, self._fail)

    def _fail(self) -> None:
        self.failed += 1

    async def ask(self, *messages: Message, headers: Mapping[str, str] | None = None) -> Identity:
        scope = conversation_scope(self.tenant, "model", None)
        return await self._identifier.identify(
            headers or {}, body(), self.tenant, False, lambda: (scope, links(messages))
        )

    async def round(
        self, *messages: Message, reply: str, headers: Mapping[str, str] | None = None
    ) -> Identity:
        """Ask, and have it answered."""
        identity = await self.ask(*messages, headers=headers)
        scope = conversation_scope(self.tenant, "model", None)
        ended = links([*messages, answer(reply)])
        inner = ended.own()[1:]
        await self._store.remember_chain(scope, ended.tip, inner, identity.session_id, TTL_S, ended.turns[0])
        return identity


def test_two_conversations_without_an_id_are_told_apart(valkey_url: str) -> None:
    """Interleaved, with one system prompt and one first question; each goes on as itself."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            client = Client(SessionStore(ledger))
            one = await client.round(SYSTEM, user("hi"), reply="hello")
            two = await client.round(SYSTEM, user("hi"), reply="good day")
            assert one.identified_by == two.identified_by == "new"
            assert one.session_id != two.session_id
            first = [SYSTEM, user("hi"), answer("hello")]
            second = [SYSTEM, user("hi"), answer("good day")]
            for number in range(3):
                for identity, history in ((one, first), (two, second)):
                    history.append(user(f"question {number}"))
                    again = await client.round(*history, reply=f"answer {number}")
                    assert (again.session_id, again.identified_by) == (identity.session_id, "prefix")
                    history.append(answer(f"answer {number}"))

    asyncio.run(scenario())


def test_a_branch_is_a_new_session_with_a_parent(valkey_url: str) -> None:
    """Who goes back and asks something else leaves the session as it is."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            client = Client(SessionStore(ledger))
            trunk = [SYSTEM, user("hi"), answer("hello")]
            parent = await client.round(*trunk[:2], reply="hello")
            await client.round(*trunk, user("a"), reply="A")
            branch = await client.round(*trunk, user("b"), reply="B")
            assert branch.identified_by == "prefix:fork"
            assert branch.parent_id == parent.session_id != branch.session_id
            on = await client.ask(*trunk, user("a"), answer("A"), user("more"))
            assert (on.session_id, on.identified_by) == (parent.session_id, "prefix")
            off = await client.ask(*trunk, user("b"), answer("B"), user("more"))
            assert (off.session_id, off.identified_by) == (branch.session_id, "prefix")

    asyncio.run(scenario())


def test_the_same_conversation_again_is_one_session(valkey_url: str) -> None:
    """Asked and answered alike, as greedy replays are: each run keeps to itself, though all is known."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            client = Client(SessionStore(ledger))
            runs = []
            for _ in range(3):
                history, ids = [SYSTEM], []
                for number in range(4):
                    history.append(user(f"question {number}"))
                    ids.append((await client.round(*history, reply=f"answer {number}")).session_id)
                    history.append(answer(f"answer {number}"))
                assert len(set(ids)) == 1
                runs.append(ids[0])
            assert len(set(runs)) == 3
            assert client.kinds == ["new", "prefix", "prefix", "prefix"] * 3

    asyncio.run(scenario())


def test_a_compacted_conversation_goes_on(valkey_url: str) -> None:
    """Early messages summarised or dropped, the latest turn still there; other system messages are others."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            client = Client(SessionStore(ledger))
            first = await client.round(SYSTEM, user("hi"), reply="hello")
            history = [SYSTEM, user("hi"), answer("hello"), user("do it")]
            await client.round(*history, reply="done: 3 files changed")
            latest = [user("do it"), answer("done: 3 files changed"), user("and now?")]
            for compacted in ([SYSTEM, user("summary: greeted"), *latest], [SYSTEM, *latest]):
                again = await client.ask(*compacted)
                assert (again.session_id, again.identified_by) == (first.session_id, "prefix:compaction")
            other = await client.ask({**SYSTEM, "content": "be long"}, *latest)
            assert other.identified_by == "new"
            old = await client.ask(SYSTEM, user("summary"), user("hi"), answer("hello"), user("and now?"))
            assert old.identified_by == "new"

    asyncio.run(scenario())


def test_inference_stays_within_tenant_and_switch(valkey_url: str) -> None:
    """Another tenant's conversation is never found; nor is any when inference is off."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            store = SessionStore(ledger)
            ours, theirs = Client(store), Client(store, tenant="other")
            off = Client(store, SessionConfig(infer=False))
            first = await ours.round(user("hi"), reply="hello")
            history = (user("hi"), answer("hello"), user("more"))
            assert (await theirs.ask(*history)).identified_by == "new"
            assert (await off.ask(*history)).identified_by == "new"
            assert (await ours.ask(*history)).session_id == first.session_id

    asyncio.run(scenario())


def test_a_named_session_is_known_by_its_messages_too(valkey_url: str) -> None:
    """A client that drops its header goes on with the session that it named; a parent may be named alone."""

    async def scenario() -> None:
        async with ledger_at(valkey_url) as ledger:
            client = Client(SessionStore(ledger))
            named = await client.round(user("hi"), reply="hello", headers={"x-session-id": "mine"})
            assert (named.session_id, named.identified_by) == ("mine", "header:x-session-id")
            later = await client.ask(user("hi"), answer("hello"), user("more"))
            assert (later.session_id, later.identified_by) == ("mine", "prefix")
            child = await client.ask(user("sub"), headers={"x-parent-session-id": "mine"})
            assert (child.identified_by, child.parent_id) == ("new", "mine")
            assert client.kinds == ["header:x-session-id", "prefix", "new"]

    asyncio.run(scenario())


def test_without_the_ledger_a_conversation_is_new_and_counted() -> None:
    """Nothing is refused; a session that is named needs no look-up."""

    async def scenario() -> None:
        async with ledger_at("redis://127.0.0.1:9/0", deadline_s=0.2) as ledger:
            client = Client(SessionStore(ledger))
            history = (user("hi"), answer("hello"), user("more"))
            assert (await client.ask(*history)).identified_by == "new"
            assert client.failed == 1
            assert (await client.ask(*history, headers={"x-session-id": "s"})).session_id == "s"
            assert (await client.ask(user("hi"))).identified_by == "new"
            assert client.failed == 1

    asyncio.run(scenario())
