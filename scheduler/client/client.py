"""`Client` and `Session`: sessions for programs that do not use asyncio.

client = Client("http://127.0.0.1:8000", model="model")
with client.session() as session:
    print(session.append("Which file?", max_tokens=200).text)
    with session.tool("read_file"):
        content = ...
    for delta in session.stream(content):
        print(delta.text, end="")
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from antiphon.client.conversation import Conversation, Given, expectation, messages_of
from antiphon.client.errors import AntiphonError, ignoring_not_found
from antiphon.client.events import Events
from antiphon.client.results import Delta, Message, Reply, SessionRecord
from antiphon.client.retries import plan_call
from antiphon.client.settings import MAX_RETRIES, TIMEOUT_S, http_settings
from antiphon.client.streams import StreamReader
from antiphon.client.tool_times import ToolTimes
from antiphon.client.transport import SyncTransport
from antiphon.client.wire import SESSIONS, Answer, Call, record_of, reply_of, session_path

log = logging.getLogger(__name__)


class Client:
    """One gateway. Sessions of several threads may share it; each session is for one thread at a time."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
    ) -> None:
        """`model` is for sessions that name none. Without `base_url` and `api_key` the environment's
        ANTIPHON_BASE_URL and ANTIPHON_API_KEY count. Raises ValueError for an URL that is none."""
        self._http = SyncTransport(httpx.Client(**http_settings(base_url, api_key, timeout_s)))
        self._events = Events()
        self.model = model
        self.max_retries = max_retries
        self.tool_times = ToolTimes()

    def session(
        self,
        id: str | None = None,  # noqa: A002
        *,
        parent_id: str | None = None,
        resume: bool = False,
        **options: Any,
    ) -> Session:
        """A session; nothing is sent yet. `options` are fields of all its chat requests: model, tools, ..

        `resume`: go on with a session of which the gateway alone knows what was said. If it has lost that,
        the round is `Refused` (410, history_lost): there is nothing to send again.
        """
        if resume and id is None:
            raise ValueError("resume needs the session's id")
        return Session(self, Conversation(id, parent_id, self._with_model(options), resumed=resume))

    def get_session(self, session_id: str) -> SessionRecord:
        return record_of(self.call(Call("GET", session_path(session_id))))

    def list_sessions(self, **query: Any) -> list[SessionRecord]:
        """One page; `query`: after, limit, status, parent_id."""
        path = f"{SESSIONS}?{httpx.QueryParams(query)}" if query else SESSIONS
        return [record_of(item) for item in self.call(Call("GET", path)).get("data", ())]

    def close_session(self, session_id: str, *, children: bool = False) -> None:
        """Its KV may go. One that is unknown or closed already is no error."""
        suffix = "?children=true" if children else ""
        with ignoring_not_found():
            self.call(Call("DELETE", session_path(session_id) + suffix))

    def notify(self, session_id: str, event: str, **fields: Any) -> bool:
        """Tell of an event (`events.EVENTS`); False if it did not get there, which is no error."""
        call = self._events.call(session_id, event, fields)
        return call is not None and self._events.told(call, self._http.send(call))

    def close(self) -> None:
        self._http.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, call: Call) -> dict[str, Any]:
        """One call with retries; raises `AntiphonError`."""
        return self._http.run(plan_call(call, self.max_retries)).object()

    def _with_model(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, **options} if self.model is not None else dict(options)


class Session:
    """One conversation. A context manager: leaving it closes the session."""

    last: Reply | None = None
    """The latest answer, a streamed one too."""

    def __init__(self, client: Client, conversation: Conversation) -> None:
        self._client = client
        self._conversation = conversation
        self._closed = False

    @property
    def id(self) -> str:
        return self._conversation.id

    @property
    def parent_id(self) -> str | None:
        return self._conversation.parent_id

    @property
    def messages(self) -> list[Message]:
        """What was said, oldest first; a copy."""
        return list(self._conversation.messages)

    def append(self, new: Given, *, final: bool = False, **options: Any) -> Reply:
        """Say something and take the answer. `final` = nothing follows. Raises `AntiphonError`."""
        messages = messages_of(new)
        with self._round():
            answer = self._run(messages, options, stream=False, final=final)
            return self._finished(messages, reply_of(answer), final)

    def stream(self, new: Given, *, final: bool = False, **options: Any) -> Generator[Delta, None, None]:
        """As `append`, bit by bit; the whole answer is in `last` afterwards. An iteration that is left early
        ends the round, and the conversation is as before."""
        messages = messages_of(new)
        with self._round():
            answer = self._run(messages, options, stream=True, final=final)
            if not answer.ok:
                raise answer.error()
            reader = StreamReader()
            with contextlib.closing(self._client._http.bytes_of(answer)) as received:
                for data in received:
                    yield from reader.feed(data)
            self._finished(messages, reader.reply(), final)

    def fork(self, n: int = 1, **options: Any) -> list[Session]:
        """Sessions that go on from here side by side; they share this one's KV."""
        call = self._conversation.fork_call(n)
        ids, known = call.body["ids"], False
        with ignoring_not_found():  # before its first round, the server does not know the session
            found = self._client.call(call)
            known = not found.get("warnings")  # else it holds too little of what was said here
        made = self._conversation.children(ids, options, known=known)
        return [Session(self._client, child) for child in made]

    def expect(
        self,
        *,
        gap_s: float | None = None,
        output_tokens: int | None = None,
        rounds: int | None = None,
        remaining_rounds: int | None = None,
        ttl_s: float | None = None,
        priority: int | None = None,
        slo: Mapping[str, Any] | None = None,
    ) -> None:
        """What is sent with every round from now on, instead of what was said before: the time between an
        answer and the next request, the length of answers, how many rounds there will be, .."""
        self._conversation.hints = expectation(
            gap_s=gap_s, output_tokens=output_tokens, rounds=rounds, remaining_rounds=remaining_rounds,
            ttl_s=ttl_s, priority=priority, slo=slo,
        )  # fmt: skip

    @contextlib.contextmanager
    def tool(self, name: str) -> Iterator[None]:
        """Around a tool's run: the gateway hears of its start, with the time that it took so far, and end."""
        times = self._client.tool_times
        self._client.notify(self.id, "tool_start", tool=name, expected_gap_s=times.expected_s(name))
        began_s = time.perf_counter()
        try:
            yield
        finally:
            times.learn(name, time.perf_counter() - began_s)
            self._client.notify(self.id, "tool_end", tool=name)

    def record(self) -> SessionRecord:
        """What the gateway knows of it."""
        return self._client.get_session(self.id)

    def close(self) -> None:
        """Once; a session in which nothing was said is not known to the gateway."""
        if not self._closed and self.last is not None:
            self._client.close_session(self.id)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except AntiphonError:
            # It ends by itself when its time is over; an error that is on its way must not be hidden.
            log.warning("session %s was not closed", self.id, exc_info=True)

    @contextlib.contextmanager
    def _round(self) -> Iterator[None]:
        self._conversation.begin()
        try:
            yield
        finally:
            self._conversation.end()

    def _run(self, new: list[Message], options: Mapping[str, Any], *, stream: bool, final: bool) -> Answer:
        retries = self._client.max_retries
        plan = self._conversation.round(new, options, stream=stream, final=final, max_retries=retries)
        return self._client._http.run(plan)

    def _finished(self, new: list[Message], reply: Reply, final: bool) -> Reply:
        self._conversation.finished(new, reply)
        self._closed = final
        self.last = reply
        return reply
