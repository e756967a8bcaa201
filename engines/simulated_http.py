"""The HTTP side of a simulated engine: SGLang's routes on aiohttp, relayed from the batch loop.

A client that goes away stops its request at once, streaming or not (SGLang notices the latter after 3 s).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from antiphon.engines import simulated_api as api
from antiphon.engines.faults import AnyFault, BreakStream, Clear, DropDirectory, Faults, parse_fault
from antiphon.engines.page_hash import namespace_seed
from antiphon.engines.scripts import Script
from antiphon.engines.simulated_loop import BatchLoop
from antiphon.engines.simulated_request import LoopRequest

VERSION = "0.5.23"
"""The SGLang that is imitated."""

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_TOKEN_ID = 2**32 - 1

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
        self._rids: set[str] = set()
        """Of requests that are being answered."""

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
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

    # ------------------------------------------------------------ answers

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        async def form_of(body: api.GenerateBody) -> tuple[LoopRequest, api.Form]:
            limit = body.sampling_params.max_new_tokens if body.sampling_params else 128
            request = self._new_request(body.input_ids, limit, body)
            return request, api.GenerateForm(request)

        return await self._answer(http, api.GenerateBody, form_of)

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        async def form_of(body: api.CompletionBody) -> tuple[LoopRequest, api.Form]:
            if body.n not in (1, None):
                raise BadRequest("n must be 1: this engine is simulated")
            request = self._new_request(body.prompt, body.max_tokens, body)
            usage = _wants_usage(body.stream_options)
            return request, api.CompletionForm(request, body.model, usage, body.return_token_ids)

        return await self._answer(http, api.CompletionBody, form_of)

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        async def form_of(body: api.ChatBody) -> tuple[LoopRequest, api.Form]:
            if not body.messages:
                raise BadRequest("Messages cannot be empty.")
            if body.n not in (1, None):
                raise BadRequest("n must be 1: this engine is simulated")
            if body.stream and body.return_token_ids:
                raise BadRequest(
                    "return_token_ids is not supported with streaming on /v1/chat/completions. "
                    "Please set stream=false when using return_token_ids=true."
                )
            limit = body.max_completion_tokens or body.max_tokens
            request = self._new_request(body.input_ids, limit, body)
            usage = _wants_usage(body.stream_options)
            form = api.ChatForm(request, body.model, usage, body.return_output_ids_in_sglext)
            return request, form

        return await self._answer(http, api.ChatBody, form_of)

    async def _answer(
        self,
        http: web.Request,
        body_type: type[BodyT],
        form_of: Callable[[BodyT], Awaitable[tuple[LoopRequest, api.Form]]],
    ) -> web.StreamResponse:
        if self._faults.take_refusal():
            return _error("refused on command", 503)
        try:
            body = msgspec.json.decode(await http.read(), type=body_type)
            request, form = await form_of(body)
        except (msgspec.MsgspecError, BadRequest) as error:
            return _error(str(error), 400)
        self._rids.add(request.rid)
        try:
            self._loop.submit(request)
            return await (self._stream(http, request, form) if body.stream else self._whole(request, form))
        finally:
            self._rids.discard(request.rid)
            if request.finish is None:
                self._loop.abort_request(request)
            if request.script is not None and (request.finish is None or request.finish.kind == "abort"):
                self._script.give_back(request.script)

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
        script = self._script.take(body.session_id) if limit != 0 else None
        natural = script.output_tokens if script is not None else None
        if natural is None and limit is None:
            natural = self._served.default_output_tokens
        return LoopRequest(
            rid=rid,
            prompt_tokens=len(prompt),
            tokens=list(prompt),
            max_new_tokens=limit if limit is not None else context - len(prompt),
            seed=namespace_seed(body.extra_key, body.cache_salt),
            natural_tokens=natural,
            script=script,
        )

    async def _whole(self, request: LoopRequest, form: api.Form) -> web.StreamResponse:
        async for _ in request.progress():
            pass
        assert request.finish is not None
        if request.finish.status:
            return _error(request.finish.message, request.finish.status)
        return _json(form.whole())

    async def _stream(self, http: web.Request, request: LoopRequest, form: api.Form) -> web.StreamResponse:
        """Server-sent events; the status goes out with the first of them, as SGLang's does."""
        cut = self._faults.take_break()
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Request-ID": request.rid}
        )
        async for start, stop in request.progress():
            if not response.prepared:
                await response.prepare(http)
            if cut is not None and stop >= cut.after_tokens:
                await self._break(http, response, form, (start, cut))
                return response
            if request.finish is not None and request.finish.status:
                await response.write(form.stream_error(request.finish.message, request.finish.status))
                await response.write(api.DONE)
                return response
            await response.write(b"".join(form.events(start, stop)))
        await response.write(b"".join(form.ending()))
        await response.write_eof()
        return response

    async def _break(
        self, http: web.Request, response: web.StreamResponse, form: api.Form, at: tuple[int, BreakStream]
    ) -> None:
        """Say what comes before the cut, then drop the connection without an end."""
        start, cut = at
        if cut.after_tokens > start:
            await response.write(b"".join(form.events(start, cut.after_tokens)))
        if http.transport is not None:
            http.transport.abort()


def _wants_usage(options: api.StreamOptions | None) -> bool:
    return bool(options is not None and options.include_usage)


def _json(data: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), content_type="application/json")


def _error(message: str, status: int) -> web.Response:
    body = msgspec.json.encode(api.error_object(message, status))
    return web.Response(status=status, body=body, content_type="application/json")
