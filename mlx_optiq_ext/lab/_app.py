"""The HTTP side: what the page may ask for."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ._answers import answer, problem
from ._chat import NOT_READY, Reply, read_request
from ._lab import Lab, Refused
from ._supervisor import PortInUse, Status, free_port

PAGE = Path(__file__).with_name("page")
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
MAX_BODY_BYTES = 8 << 20

Endpoint = Callable[[Request], Awaitable[Response | Reply]]


def make_app(lab: Lab) -> Starlette:
    """The application for a Lab, without the guard in front of it."""
    routes = [
        *(Route(path, _file(content, kind)) for path, content, kind in _files()),
        Route("/api/events", _events(lab)),
        Route("/api/chat", _json(_chat, lab), methods=["POST"]),
    ]
    for path, act in (
        ("/api/command", _command),
        ("/api/check", _check),
        ("/api/start", _start),
        ("/api/stop", _stop),
        ("/api/free-port", _free_port),
        ("/api/models", _models),
        ("/api/bench", _bench),
        ("/api/bench/stop", _stop_bench),
        ("/api/download", _download),
        ("/api/download/stop", _stop_download),
    ):
        routes.append(Route(path, _json(act, lab), methods=["POST"]))

    @asynccontextmanager
    async def run(_: Starlette) -> AsyncIterator[None]:
        await lab.open()
        try:
            yield
        finally:
            await lab.close()

    return Starlette(routes=routes, lifespan=run)


def _files() -> list[tuple[str, bytes, str]]:
    """The files of the page, read once: a path of a request opens none."""
    files = [file for file in sorted(PAGE.iterdir()) if file.suffix in TYPES]
    names = {"index.html": "/"}
    return [
        (names.get(f.name, f"/{f.name}"), f.read_bytes(), TYPES[f.suffix])
        for f in files
    ]


def _file(content: bytes, kind: str) -> Endpoint:
    async def send(_: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _events(lab: Lab) -> Endpoint:
    async def send(_: Request) -> Response:
        stream = lab.feed.stream(lab.snapshot)
        return StreamingResponse(stream, media_type="text/event-stream")

    return send


def _json(act: Callable[[Lab, Any], Awaitable[Any]], lab: Lab) -> Endpoint:
    """Answer with what an action returns for a body, or why it does not."""

    async def act_on(request: Request) -> Response | Reply:
        kind = request.headers.get("content-type", "").partition(";")[0]
        if kind.strip().lower() != "application/json":
            return problem(415, "expected application/json")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                return problem(413, f"expected at most {MAX_BODY_BYTES} bytes")
        try:
            found = await act(lab, json.loads(body))
        except (Refused, PortInUse) as error:
            return problem(409, str(error))
        except RecursionError:
            return problem(400, "expected a body that is not nested so deeply")
        except ValueError as error:
            return problem(400, str(error))
        return found if isinstance(found, Reply) else answer(found)

    return act_on


async def _command(lab: Lab, body: Any) -> Any:
    return {"command": lab.read(body).shell_command}


async def _check(lab: Lab, body: Any) -> Any:
    model, drafter = lab.read_pair(body)
    return await lab.checks.ask(model, drafter)


async def _start(lab: Lab, body: Any) -> Any:
    await lab.start(lab.read(body))
    return {}


async def _stop(lab: Lab, _: Any) -> Any:
    await lab.stop()
    return {}


async def _free_port(_lab: Lab, _: Any) -> Any:
    return {"port": free_port()}


async def _models(lab: Lab, _: Any) -> Any:
    lab.look_for_models()
    return {}


async def _bench(lab: Lab, body: Any) -> Any:
    lab.start_bench(body)
    return {}


async def _stop_bench(lab: Lab, _: Any) -> Any:
    await lab.bench.stop()
    return {}


async def _download(lab: Lab, body: Any) -> Any:
    lab.download(body)
    return {}


async def _stop_download(lab: Lab, _: Any) -> Any:
    await lab.downloads.stop()
    return {}


async def _chat(lab: Lab, body: Any) -> Reply:
    request = read_request(body)
    launch = lab.supervisor.launch
    if launch is None or lab.supervisor.state.status != Status.READY:
        raise Refused(NOT_READY)
    return Reply(lab.client, launch, request)
