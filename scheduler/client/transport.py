"""Sync and async HTTP under the clients: one call out, one outcome back; and driving a plan.

httpx for both: it is a dependency already, and an agent's own rounds are few, so what it costs more than
aiohttp does not count here as it does in a gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator

import httpx

from antiphon.client.errors import StreamBroke, Unreachable
from antiphon.client.retries import Plan, Wait
from antiphon.client.wire import Answer, Call, Outcome


class SyncTransport:
    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def send(self, call: Call) -> Outcome:
        request = _request(self.client, call)
        try:
            response = self.client.send(request, stream=True)
            if call.stream and response.is_success:
                return Answer(response.status_code, response.headers, stream=response)
            try:
                return Answer(response.status_code, response.headers, response.read())
            finally:
                response.close()
        except httpx.RequestError as error:
            return _unreachable(call, error)

    def bytes_of(self, answer: Answer) -> Generator[bytes, None, None]:
        """Of an answer that is streamed; close it to be done with it. Raises `StreamBroke`."""
        with contextlib.closing(answer.stream) as response:
            try:
                yield from response.iter_bytes()
            except httpx.RequestError as error:
                raise StreamBroke(str(error) or type(error).__name__) from error

    def run(self, plan: Plan) -> Answer:
        """Do what the plan asks for; its answer, or what it raises."""
        outcome: Outcome | None = None
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as done:
                answer: Answer = done.value
                return answer
            if isinstance(step, Wait):
                time.sleep(step.delay_s)
                outcome = None
            else:
                outcome = self.send(step.call)


class AsyncTransport:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def send(self, call: Call) -> Outcome:
        request = _request(self.client, call)
        try:
            response = await self.client.send(request, stream=True)
            if call.stream and response.is_success:
                return Answer(response.status_code, response.headers, stream=response)
            try:
                return Answer(response.status_code, response.headers, await response.aread())
            finally:
                await response.aclose()
        except httpx.RequestError as error:
            return _unreachable(call, error)

    async def bytes_of(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(answer.stream) as response:
            try:
                async for data in response.aiter_bytes():
                    yield data
            except httpx.RequestError as error:
                raise StreamBroke(str(error) or type(error).__name__) from error

    async def run(self, plan: Plan) -> Answer:
        outcome: Outcome | None = None
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as done:
                answer: Answer = done.value
                return answer
            if isinstance(step, Wait):
                await asyncio.sleep(step.delay_s)
                outcome = None
            else:
                outcome = await self.send(step.call)


def _request(client: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    return client.build_request(
        call.method,
        call.path,
        content=call.content(),
        headers=dict(call.headers),
        timeout=httpx.USE_CLIENT_DEFAULT if call.deadline_s is None else call.deadline_s,
    )


def _unreachable(call: Call, error: Exception) -> Unreachable:
    return Unreachable(f"{call.method} {call.path}: {error or type(error).__name__}")
