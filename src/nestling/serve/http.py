"""OpenAI's API over a service: routes, streams, and errors in its form."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from nestling.errors import NestlingError
from nestling.serve.answer import ChatForm, CompletionForm, Form, collected
from nestling.serve.guard import Guard
from nestling.serve.protocol import Asked, Chat, Completion, Failure
from nestling.serve.service import Asking, Service

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "An error in OpenAI's form."} for status in (400, 401, 404, 413, 429, 500, 503)
}


def create_app(service: Service, api_key: str | None = None, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The application. hosts: names it may be called by, against pages that point a name of theirs at this machine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    app = FastAPI(title="Nestling", lifespan=lifespan, responses=ERRORS)
    limits = service.limits
    app.add_middleware(Guard, api_key=api_key, hosts=hosts, body_bytes=limits.body_bytes, at_once=4 * limits.open)
    _errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models.listed()}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return service.models.described(model, await asyncio.to_thread(service.models.find, model))

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        asking = await service.chat(asked, _client(request))
        return await _answer(service, asked, asking, ChatForm(service.models.tokenizer), request)

    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        asking = await service.completion(asked, _client(request))
        return await _answer(service, asked, asking, CompletionForm(service.models.tokenizer), request)

    return app


def _client(request: Request) -> str:
    """Who takes turns with whom."""
    return request.client.host if request.client else ""


async def _answer(service: Service, asked: Asked, asking: Asking, form: Form, request: Request) -> Response:
    stamp = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return Stream(_events(service, asking, form, stamp, with_usage), lambda: service.let_go(asking))
    try:
        return JSONResponse(await _unless_gone(request, collected(service.follow(asking), asking, form, stamp)))
    finally:
        service.let_go(asking)


class Stream(StreamingResponse):
    """A stream that lets go of what is behind it as soon as it ends, however it ends, begun or not."""

    def __init__(self, events: AsyncGenerator[str], let_go: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.let_go = let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: Any = self.body_iterator
        try:
            async with aclosing(pieces):
                await super().__call__(scope, receive, send)
        finally:
            self.let_go()


async def _events(
    service: Service, asking: Asking, form: Form, stamp: dict[str, Any], with_usage: bool
) -> AsyncGenerator[str]:
    """Server-sent events; a failure on the way is an event too, since the status has been sent."""
    try:
        for opening in form.opening(asking):
            yield _event(stamp | opening)
        async with aclosing(service.follow(asking)) as pieces:
            async for piece in pieces:
                for chunk in form.chunks(piece):
                    yield _event(stamp | chunk)
        if with_usage:
            yield _event(stamp | {"object": form.chunk, "choices": [], "usage": asking.usage()})
    except Failure as failure:
        yield _event(failure.body())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"  # in ASCII: clients that split lines as Unicode does would cut at U+2028


async def _unless_gone(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The result of the work, which is given up when the client hangs up."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Failure(499, "the client has gone")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _errors(app: FastAPI) -> None:
    def handles(kind: type[Exception]) -> Callable[[Callable[[Any], Failure]], None]:
        def register(failure_of: Callable[[Any], Failure]) -> None:
            async def handler(_: Request, error: Exception) -> Response:
                failure = failure_of(error)
                headers = {"Retry-After": "1"} if failure.status in (429, 503) else None
                return JSONResponse(failure.body(), failure.status, headers)

            app.add_exception_handler(kind, handler)

        return register

    handles(Failure)(lambda failure: failure)
    handles(NestlingError)(lambda error: Failure(400, str(error)))
    handles(HTTPException)(lambda error: Failure(error.status_code, str(error.detail)))
    handles(RequestValidationError)(_invalid)
    handles(Exception)(lambda error: Failure(500, "the server failed on this request"))


def _invalid(error: RequestValidationError) -> Failure:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Failure(
            400, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}", "invalid_value"
        )
    place = ".".join(str(step) for step in first["loc"][1:])
    return Failure(400, f"{place or 'the body'}: {first['msg']}", "invalid_value", place or None)
