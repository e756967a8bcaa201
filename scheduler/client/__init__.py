"""`antiphon.client`: sessions for Python programs, sync and async.

client.py        Client and Session
async_client.py  AsyncClient and AsyncSession: the same with await
conversation.py  one session as its client knows it: what is sent, what everything is sent for
retries.py       whether and when a call is made again, as plans without I/O
transport.py     HTTP, and what drives a plan
settings.py      which gateway
wire.py          calls and answers as data; streams.py: an answer bit by bit
events.py        what happens between rounds, told; tool_times.py: how long tools take
results.py       replies, usage, sessions; errors.py: what can go wrong, by whose fault
"""

from antiphon.client.async_client import AsyncClient, AsyncSession
from antiphon.client.client import Client, Session
from antiphon.client.errors import (
    AntiphonError,
    ApiError,
    Overloaded,
    Refused,
    ServerFault,
    SessionBusy,
    StreamBroke,
    Unreachable,
)
from antiphon.client.results import Delta, Reply, SessionInfo, SessionRecord, ToolCall, Usage, tool_result

__all__ = [
    "AntiphonError",
    "ApiError",
    "AsyncClient",
    "AsyncSession",
    "Client",
    "Delta",
    "Overloaded",
    "Refused",
    "Reply",
    "ServerFault",
    "Session",
    "SessionBusy",
    "SessionInfo",
    "SessionRecord",
    "StreamBroke",
    "ToolCall",
    "Unreachable",
    "Usage",
    "tool_result",
]
