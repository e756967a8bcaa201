"""The HTTP side of a simulated engine: SGLang's routes on aiohttp, relayed from the batch loop.

A client that goes away stops its request at once, streaming or not (SGLang notices the latter after 3 s).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from antiphon.engines import simulated_api as api
from antiphon.engines.faults import AnyFault, BreakStream, Clear, DropDirectory, Faults, parse_fault
from antiphon.engines.page_hash import namespace_seed
from antiphon.engines.scripts import Script, ScriptLine, cut_at_stop
from antiphon.engines.simulated_gate import asking_for
from antiphon.engines.simulated_loop import BatchLoop
from antiphon.engines.simulated_request import Finish, LoopRequest, progress
from antiphon.engines.simulated_schema import forced_line

VERSION = "0.5.23"
"""The SGLang that is imitated."""

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_TOKEN_ID = 2**32 - 1
MAX_CHOICES = 128

BodyT = TypeVar("BodyT", api.GenerateBody, api.CompletionBody, api.ChatBody)


class BadRequest(Exception):
    """Answered with 400 and this message."""


@dataclass(frozen=True, slots=True)
class Served:
    """What the routes tell about the engine."""

    model_id: str
    context_tokens: int
    default_output_tokens: int
    """Length of an answer that nothing limits."""
    fault_injection: bool
    info: dict[str, Any]
    """For /server_info."""


class SimulatedHttp:
    """Routes of one engine. `set_directory` opens or closes its directory, for the fault of that name."""

    def __init__(
        self,
        served: Served,
        loop: BatchLoop,
        script: Script,
        faults: Faults,
        set_directory: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._served = served
        self._loop = loop
        self._script = script
        self._faults = faults
        self._set_directory = set_directory
        self._rids: dict[str, str] = {}
        """Of requests that are being answered: rid -> session."""
        self._taken: dict[str, ScriptLine] = {}
        """By rid: the script's lines that are being said."""

    def app(self, key: str = "") -> web.Application:
        """With `key`, as SGLang with `--api-key`: all but health asks for it. Test hooks stay open."""
        middlewares = [asking_for(key)] if key else []
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=middlewares)
        for path in ("/health", "/health_generate"):
            app.router.add_get(path, self._health)
        for path in ("/model_info", "/get_model_info"):
            app.router.add_get(path, self._model_info)
        for path in ("/server_info", "/get_server_info"):
            app.router.add_get(path, self._server_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/abort_request", self._abort)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/flush_cache", self._flush)
        if self._served.fault_injection:
            app.router.add_post("/antiphon/faults", self._fault)
            app.router.add_get("/antiphon/live", self._live)
        return app

    # ------------------------------------------------------------ information

    async def _health(self, http: web.Request) -> web.Response:
        return web.Response()

    async def _model_info(self, http: web.Request) -> web.Response:
        model_id = self._served.model_id
        return _json(
            {
                "model_path": model_id,
                "served_model_name": model_id,
                "tokenizer_path": model_id,
                "is_generation": True,
                "weight_version": "default",
                "disaggregation_mode": "null",
                "model_type": "simulated",
            }
        )

    async def _server_info(self, http: web.Request) -> web.Response:
        totals = msgspec.to_builtins(self._loop.totals)
        return _json({**self._served.info, "version": VERSION, "internal_states": [totals]})

    async def _models(self, http: web.Request) -> web.Response:
        card = {
            "id": self._served.model_id,
            "object": "model",
            "created": 0,
            "owned_by": "sglang",
            "root": self._served.model_id,
            "parent": None,
            "max_model_len": self._served.context_tokens,
        }
        return _json({"object": "list", "data": [card]})

    async def _loads(self, http: web.Request) -> web.Response:
        loop = self._loop
        used, pool = loop.used_tokens, loop.pool_tokens
        load = {
            "dp_rank": 0,
            "num_running_reqs": loop.running_requests,
            "num_waiting_reqs": len(loop.waiting),
            "num_waiting_uncached_tokens": loop.waiting_uncached_tokens,
            "num_used_tokens": used,
            "num_total_tokens": used + sum(len(request.tokens) for request in loop.waiting),
            "max_total_num_tokens": pool,
            "max_running_requests": loop.settings.max_running_requests,
            "token_usage": used / pool,
            "total_prefill_uncached_tokens": loop.totals.prefill_uncached_tokens,
            "total_prefill_busy_us": int(loop.totals.prefill_busy_s * 1e6),
        }
        return _json(api.loads_json([load], VERSION))

    # ------------------------------------------------------------ control

    async def _abort(self, http: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await http.read(), type=dict[str, Any])
        except msgspec.MsgspecError as error:
            return _error(f"abort_request: {error}", 400)
        # As SGLang: without a rid, "" is the beginning of every one.
        self._loop.abort(str(body.get("rid") or ""), everything=bool(body.get("abort_all")))
        return web.Response()

    async def _flush(self, http: web.Request) -> web.Response:
        if self._loop.flush():
            return web.Response(text="Cache flushed.\n")
        return web.Response(status=400, text="Flush cache failed: requests are running or waiting.\n")

    async def _fault(self, http: web.Request) -> web.Response:
        try:
            fault: AnyFault = parse_fault(await http.read())
        except ValueError as error:
            return _error(str(error), 400)
        self._faults.arm(fault)
        if isinstance(fault, DropDirectory):
            await self._set_directory(False)
        elif isinstance(fault, Clear):
            self._loop.clear_hangs()
            await self._set_directory(True)
        return _json({"armed": type(fault).__name__})

    async def _live(self, http: web.Request) -> web.Response:
        """What is being answered, for tests that must know where a round is."""
        return _json(
            [
                {
                    "session": self._rids.get(request.rid, ""),
                    "admitted": request.admitted,
                    "computed_tokens": request.computed,
                    "output_tokens": request.output_tokens,
                }
                for request in self._loop.live
            ]
        )

    # ------------------------------------------------------------ answers

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        def form_of(body: api.GenerateBody) -> tuple[list[LoopRequest], api.Form]:
            limit = body.sampling_params.max_new_tokens if body.sampling_params else 128
            request = self._new_request(body.input_ids, limit, body)
            if limit != 0:
                self._script_for([request], body.session_id)
            return [request], api.GenerateForm(request)

        return await self._answer(http, api.GenerateBody, form_of)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        def form_of(body: api.CompletionBody) -> tuple[list[LoopRequest], api.Form]:
            forced = forced_line(body.response_format, body.json_schema, None, None)
            requests = self._choices(body.prompt, body.max_tokens, body, forced)
            return requests, api.CompletionForm(body, requests)

        return await self._answer(http, api.CompletionBody, form_of)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        def form_of(body: api.ChatBody) -> tuple[list[LoopRequest], api.Form]:
            if not body.messages:
                raise BadRequest("Messages cannot be empty.")
            if body.stream and body.return_token_ids:
                raise BadRequest(
                    "return_token_ids is not supported with streaming on /v1/chat/completions. "
                    "Please set stream=false when using return_token_ids=true."
                )
            forced = forced_line(body.response_format, None, body.tools, body.tool_choice)
            limit = body.max_completion_tokens or body.max_tokens
            requests = self._choices(body.input_ids, limit, body, forced)
            return requests, api.ChatForm(body, requests)

        return await self._answer(http, api.ChatBody, form_of)

    async def _answer(
        self,
        http: web.Request,
        body_type: type[BodyT],
        form_of: Callable[[BodyT], tuple[list[LoopRequest], api.Form]],
    ) -> web.StreamResponse:
        if self._faults.take_refusal():
            return _error("refused on command", 503)
        try:
            body = msgspec.json.decode(await http.read(), type=body_type)
            requests, form = form_of(body)
        except (msgspec.MsgspecError, BadRequest, ValueError) as error:
            return _error(str(error), 400)
        rid = body.rid or requests[0].rid
        self._rids[rid] = body.session_id or ""
        try:
            if len(requests) > 1:
                await self._compute_prompt(requests[0], rid)
            for request in requests:
                self._loop.submit(request)
            return await (self._stream(http, requests, form) if body.stream else self._whole(requests, form))
        finally:
            self._rids.pop(rid, None)
            for request in requests:
                if request.finish is None:
                    self._loop.abort_request(request)
            self._give_back(requests)

    async def _compute_prompt(self, first: LoopRequest, rid: str) -> None:
        """As SGLang: several answers to one prompt wait until it is computed, so that they share its KV."""
        prompt = replace(first, rid=f"{rid}_prompt", tokens=list(first.tokens), max_new_tokens=0,
                         script=None, changed=asyncio.Event())  # fmt: skip
        self._loop.submit(prompt)
        try:
            async for _ in prompt.progress():
                pass
        finally:
            if prompt.finish is None:
                self._loop.abort_request(prompt)

    def _choices(
        self, prompt: list[int], limit: int | None, body: api.Common, forced: ScriptLine | None
    ) -> list[LoopRequest]:
        """The requests of `n` answers, scripted; `forced` is said where no line is."""
        n = 1 if body.n is None else body.n
        if not 1 <= n <= MAX_CHOICES:
            raise BadRequest(f"n must be 1 to {MAX_CHOICES}, got {n}")
        first = self._new_request(prompt, limit, body)
        changed = first.changed
        requests = [first] if n == 1 else [
            replace(first, rid=f"{first.rid}_{number}", tokens=list(prompt), choice=number, changed=changed)
            for number in range(n)
        ]  # fmt: skip
        if limit != 0:
            self._script_for(requests, body.session_id, body.stops, forced)
        return requests

    def _script_for(
        self,
        requests: list[LoopRequest],
        session_id: str | None,
        stops: Sequence[str] = (),
        forced: ScriptLine | None = None,
    ) -> None:
        for request in requests:
            taken = self._script.take(session_id)
            line = taken or forced
            if taken is not None:
                self._taken[request.rid] = taken
            if line is not None:
                request.script, request.matched_stop = cut_at_stop(line, stops)
                request.natural_tokens = request.script.output_tokens

    def _give_back(self, requests: list[LoopRequest]) -> None:
        """What was not said to the end; the last first, so that the order stays."""
        for request in reversed(requests):
            line = self._taken.pop(request.rid, None)
            if line is not None and (request.finish is None or request.finish.kind == "abort"):
                self._script.give_back(line)

    def _new_request(self, prompt: list[int], limit: int | None, body: Any) -> LoopRequest:
        """Check what SGLang's tokenizer manager checks."""
        context = self._served.context_tokens
        if not prompt or not all(0 <= token <= MAX_TOKEN_ID for token in prompt):
            raise BadRequest("the prompt must be a non-empty list of token ids")
        if limit is not None and limit < 0:
            raise BadRequest(f"max_new_tokens must be at least 0, got {limit}.")
        if len(prompt) >= context:
            raise BadRequest(
                f"The input ({len(prompt)} tokens) is longer than the model's context length "
                f"({context} tokens)."
            )
        if limit is not None and len(prompt) + limit > context:
            raise BadRequest(
                f"Requested token count exceeds the model's maximum context length of {context} tokens: "
                f"{len(prompt)} tokens from the input and {limit} tokens for the completion."
            )
        rid = body.rid or uuid.uuid4().hex
        if rid in self._rids:
            raise BadRequest(f"Duplicate request ID detected: {rid}")
        natural = self._served.default_output_tokens if limit is None else None
        return LoopRequest(
            rid=rid,
            prompt_tokens=len(prompt),
            tokens=list(prompt),
            max_new_tokens=limit if limit is not None else context - len(prompt),
            seed=namespace_seed(body.extra_key, body.cache_salt),
            natural_tokens=natural,
            script=None,
        )

    async def _whole(self, requests: list[LoopRequest], form: api.Form) -> web.StreamResponse:
        async for _ in progress(requests):
            pass
        if failure := _failure(requests):
            return _error(failure.message, failure.status)
        return _json(form.whole())

    async def _stream(
        self, http: web.Request, requests: list[LoopRequest], form: api.Form
    ) -> web.StreamResponse:
        """Server-sent events; the status goes out with the first of them, as SGLang's does."""
        cut = self._faults.take_break()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Request-ID": requests[0].rid}
        )
        async for choice, start, stop in progress(requests):
            if not response.prepared:
                await response.prepare(http)
            if cut is not None and stop >= cut.after_tokens:
                await self._break(http, response, form, (choice, start, cut))
                return response
            if failure := _failure(requests[choice : choice + 1]):
                await response.write(form.stream_error(failure.message, failure.status))
                await response.write(api.DONE)
                return response
            await response.write(b"".join(form.events(choice, start, stop)))
        await response.write(b"".join(form.ending()))
        await response.write_eof()
        return response

    async def _break(
        self,
        http: web.Request,
        response: web.StreamResponse,
        form: api.Form,
        at: tuple[int, int, BreakStream],
    ) -> None:
        """Say what comes before the cut, then drop the connection without an end."""
        choice, start, cut = at
        if cut.after_tokens > start:
            await response.write(b"".join(form.events(choice, start, cut.after_tokens)))
        if http.transport is not None:
            http.transport.abort()


def _failure(requests: Sequence[LoopRequest]) -> Finish | None:
    """Why one of the requests has no answer."""
    return next((r.finish for r in requests if r.finish is not None and r.finish.status), None)


def _json(data: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json")


def _error(message: str, status: int) -> web.Response:
    body = msgspec.json.encode(api.error_object(message, status))
    return web.Response(status=status, body=body, content_type="application/json")
