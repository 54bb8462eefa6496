"""The web front: JSON in and out over HTTP, health, and metrics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from shardwise.serving.outputs import by_sample
from shardwise.serving.request import Refused
from shardwise.serving.service import Service

READ = 30.0
"""Seconds that a body may take to come."""
LINGER = 10.0
"""Seconds for which what is sent beyond the limit is read and thrown away, so that the client gets to its answer."""
_GONE = 499  # of a client that left; nobody gets it
_RETRY_AFTER = "1"  # seconds


def application(service: Service, *, max_bytes: int) -> Starlette:
    """The routes of a server: POST /predict or /generate, GET /healthz, GET /metrics.

    Args:
        service: is started, and closed, by somebody else.
        max_bytes: of a body.
    """

    async def answer(http: HttpRequest) -> Response:
        began = time.monotonic()
        response = await _answered(http)
        service.metrics.request(response.status_code, time.monotonic() - began)
        return response

    async def _answered(http: HttpRequest) -> Response:
        try:
            given = service.intake.read(await _body(http, max_bytes))
            service.submit(given.request)
            try:
                found = await _unless_gone(http, asyncio.wrap_future(given.request.answer))
            except (ClientDisconnect, asyncio.CancelledError):
                service.forget(given.request)
                raise
            outputs = by_sample(found)
            if service.generates:
                service.metrics.tokens(sum(map(len, outputs)))
            return _json(200, {"outputs": outputs[0] if given.one else outputs})
        except Refused as refused:
            return _refusal(refused)
        except ClientDisconnect:
            return Response(status_code=_GONE)

    async def health(http: HttpRequest) -> Response:
        ready, replicas = service.ready, len(service.replicas)
        status = "ok" if ready == replicas else "degraded" if ready else "unavailable"
        return _json(200 if ready else 503, {"status": status, "replicas": replicas, "ready": ready})

    async def metrics(http: HttpRequest) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    async def refused(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        routes = f"POST {service.intake.path}, GET /healthz, GET /metrics"
        return _json(error.status_code, {"error": f"{http.method} {http.url.path}: there is {routes}"}, error.headers)

    return Starlette(
        routes=[
            Route(service.intake.path, answer, methods=["POST"]),
            Route("/healthz", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={HTTPException: refused},
    )


def _json(status: int, content: Any, headers: Any = None) -> Response:
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers, media_type="application/json")


def _refusal(refused: Refused) -> Response:
    headers = {"Retry-After": _RETRY_AFTER} if refused.status == 503 else None
    response = _json(refused.status, {"error": refused.message, **refused.told}, headers)
    if refused.status in (408, 413):
        return _Closing(response.body, refused.status, {"Connection": "close"}, media_type="application/json")
    return response


async def _body(http: HttpRequest, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refused: 413, it has more bytes than it may; 408, it does not come.
        ClientDisconnect: nor does the rest of it.
    """
    told = http.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most:
        raise _too_large(most, int(told))
    found = bytearray()
    try:
        async with asyncio.timeout(READ):
            async for chunk in http.stream():
                found += chunk
                if len(found) > most:
                    raise _too_large(most, None)
    except TimeoutError:
        raise Refused(408, f"the body did not come within {READ:g} s") from None
    return bytes(found)


def _too_large(most: int, given: int | None) -> Refused:
    has = f"{given:,} bytes" if given is not None else "more bytes"
    return Refused(
        413, f"the body has {has}, but may have {most:,}; send fewer samples at a time", expected=most, given=given
    )


async def _unless_gone(http: HttpRequest, answer: asyncio.Future[Any]) -> Any:
    """What is waited for.

    Raises:
        ClientDisconnect: the client left before.
    """
    gone = asyncio.ensure_future(_left(http.receive))
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        gone.cancel()


async def _left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Closing(Response):
    """An answer before the body has come, after which the connection is closed.

    A connection that is closed while the client still sends is reset, and the answer is lost with it. So what comes is
    thrown away for a while.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        break
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
