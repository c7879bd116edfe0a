"""A small server that speaks OpenAI's protocol: one base model, any number of adapters, mixed in every batch."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from delora.integrations import protocol
from delora.integrations.engine import Engine, Refused
from delora.integrations.protocol import Asked, body_of, shown, text

__all__ = ["application", "server"]


class _Answer:
    """What comes of one request's texts, in the event loop that the request came from."""

    def __init__(self, engine: Engine, asked: Asked, chat: bool) -> None:
        self.asked, self.chat, self.engine = asked, chat, engine
        self.events: asyncio.Queue[tuple[int, str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int, what: str, value: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self.events.put_nowait, (index, what, value))

        self.jobs = asked.jobs(tell)
        engine.submit(self.jobs)
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": asked.settings["adapter"] or engine.name,
        }

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancelled = True

    def usage(self) -> dict[str, int]:
        read, written = sum(map(len, self.asked.prompts)), sum(len(job.written) for job in self.jobs)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self) -> dict[str, Any]:
        texts = ["" for _ in self.jobs]
        reasons: dict[int, str] = {}
        while len(reasons) < len(self.jobs):
            index, what, value = await self.events.get()
            if what == "error":
                self.cancel()
                raise value
            if what == "text":
                texts[index] += value
            else:
                reasons[index] = value
        choices = [
            {
                "index": i,
                "finish_reason": reasons[i],
                "logprobs": None,
                **({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}),
            }
            for i, text in enumerate(texts)
        ]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, as OpenAI's clients read them."""
        head = {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head
        left = len(self.jobs)

        def chunk(index: int, text: str | None, reason: str | None, **more: Any) -> str:
            part: dict[str, Any] = {"text": text or ""}
            if self.chat:
                part = {"delta": {**more, **({} if text is None else {"content": text})}}
            choice = {"index": index, **part, "finish_reason": reason, "logprobs": None}
            return _event({**head, "choices": [choice]})

        try:
            if self.chat:
                for index in range(left):
                    yield chunk(index, "", None, role="assistant")
            while left:
                index, what, value = await self.events.get()
                if what == "error":
                    yield _event(value.body())
                    break
                left -= what == "done"
                yield chunk(index, value, None) if what == "text" else chunk(index, None, value)
            if self.asked.usage:
                yield _event({**head, "choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _gone(request: Request) -> None:
    """Returns when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        await super().startup(*args, **kwargs)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self.ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def server(engine: Engine, host: str, port: int, ready: Callable[[str], None]) -> uvicorn.Server:
    """A server of the application, to be run by its ``run()``. ``ready`` gets its address as soon as it listens.

    Args:
        engine: what it serves; it ends with the server.
        host: the address to listen on.
        port: 0 for any free one.
        ready: is called once.
    """
    config = uvicorn.Config(application(engine), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
    return _Server(config, ready)


def application(engine: Engine) -> Starlette:
    """The ASGI application: /v1/models, /v1/completions, /v1/chat/completions, /v1/adapters and /health."""

    def error(refused: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if refused.status == 429 else None
        return JSONResponse(refused.body(), refused.status, headers)

    async def answer(request: Request, read: Callable[[Engine, Any], Asked], chat: bool) -> Response:
        asked = await run_in_threadpool(read, engine, await body_of(request))
        answer = _Answer(engine, asked, chat)
        if asked.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        work, gone = asyncio.create_task(answer.whole()), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(work.result())
        finally:
            answer.cancel()
            work.cancel()
            gone.cancel()

    async def completions(request: Request) -> Response:
        return await answer(request, protocol.completion, chat=False)

    async def chat(request: Request) -> Response:
        return await answer(request, protocol.chat, chat=True)

    async def models(request: Request) -> Response:
        names = [engine.name, *engine.adapters]
        return JSONResponse({"object": "list", "data": [_model(engine, name) for name in names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        engine.known(name)
        return JSONResponse(_model(engine, name))

    async def health(request: Request) -> Response:
        if not engine.alive:
            raise Refused("the thread that runs the model has ended", 503)
        return JSONResponse({"status": "ok", "batches": engine.batches})

    def changeable() -> Path:
        if engine.shelf is None:
            raise Refused("adapters cannot be added or dropped here: start the server with --shelf FOLDER", 403)
        return engine.shelf.resolve()

    async def add(request: Request) -> Response:
        shelf = changeable()
        body = await body_of(request)
        if not isinstance(body, dict):
            raise Refused(f"expected a JSON object, got {shown(body)}")
        name, folder = body.get("name", body.get("lora_name")), body.get("folder", body.get("lora_path"))
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", name):
            raise Refused(f"name = {shown(name)}: an adapter's name is made of letters, digits, '_' and '-'", param="name")
        folder = text(folder, "folder")
        if "\0" in folder:
            raise Refused(f"folder = {shown(folder)}: must be a folder's name", param="folder")
        path = (shelf / folder).resolve()
        if not path.is_relative_to(shelf):
            raise Refused(f"folder = {shown(folder)}: must be in the folder of --shelf", 403, "folder")
        await run_in_threadpool(engine.add, name, path)
        return JSONResponse(_model(engine, name))

    async def drop(request: Request) -> Response:
        changeable()
        name = request.path_params.get("name")
        if name is None:
            body = await body_of(request)
            name = text(body.get("lora_name") if isinstance(body, dict) else None, "lora_name")
        await run_in_threadpool(engine.drop, name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.stop)

    async def http_error(request: Request, raised: Exception) -> Response:
        e = cast(HTTPException, raised)
        return error(Refused(f"{request.method} {request.url.path}: {e.detail}", e.status_code))

    async def refused(request: Request, raised: Exception) -> Response:
        return error(cast(Refused, raised))

    async def defect(request: Request, raised: Exception) -> Response:
        return error(Refused(f"a defect of the server: {type(raised).__name__}", 500))

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/adapters", add, methods=["POST"]),
            Route("/v1/adapters/{name}", drop, methods=["DELETE"]),
            # The names that vLLM has for the same.
            Route("/v1/load_lora_adapter", add, methods=["POST"]),
            Route("/v1/unload_lora_adapter", drop, methods=["POST"]),
        ],
        exception_handlers={HTTPException: http_error, Refused: refused, Exception: defect},
        lifespan=life,
    )


def _model(engine: Engine, name: str) -> dict[str, Any]:
    parent = None if name == engine.name else engine.name
    return {"id": name, "object": "model", "created": 0, "owned_by": "delora", "parent": parent}
