"""An OpenAI-compatible server of a wrapped model: transformers' own request handlers behind our gate.

The handlers are internals of transformers, which may change with every minor version: they are imported late, and only
of the versions that were tested. Continuous batching stays off: its paged path goes around ``generate``, in which a
wrapped model works.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import logging
import re
import signal
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmeff.errors import ConfigError, EnvironmentMismatchError, MissingExtraError, VlmeffError
from vlmeff.integrations.server_gate import RequestLimits, check_chat, check_responses
from vlmeff.integrations.server_images import RefusedRequest
from vlmeff.integrations.server_shapes import parse_body

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

TESTED = ">=5.23,<5.24"
NEEDED = ("fastapi", "uvicorn", "openai")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECONDS = 60.0  # to send a whole request body
MAX_CONNECTIONS = 256  # more are answered with 503
GOODBYE_SECONDS = 20  # that running requests have when the server is told to end
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("vlmeff.serve")


def check_environment() -> None:
    """Refuse to start without the packages, or with a transformers whose internals nobody has tried.

    Raises:
        MissingExtraError: E-ENV-01.
        EnvironmentMismatchError: E-ENV-02.
    """
    for module in NEEDED:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "serve", "the routes of vlmeff serve")
    from packaging.specifiers import SpecifierSet

    installed = importlib.metadata.version("transformers")
    if not SpecifierSet(TESTED, prereleases=True).contains(installed):
        raise EnvironmentMismatchError(
            f"E-ENV-02: vlmeff serve builds on internals of transformers {TESTED} and was tested with these alone; "
            f'{installed} is installed. pip install "transformers{TESTED}"'
        )


def build_app(
    model: Any,
    processor: Any,
    *,
    name: str,
    limits: RequestLimits,
    hosts: Sequence[str] | None = None,
    cors_origins: Sequence[str] = (),
) -> Starlette:
    """The ASGI application: two OpenAI routes, /v1/models and /health, and nothing else.

    Args:
        model, processor: of ``vlmeff.load``, wrapped or not.  name: what clients call the model.
        hosts: the values of the Host header that are answered; None for all. A page in a browser that has made its own
            name point here is not among them.
        cors_origins: pages of these origins may ask; none by default.
    """
    check_environment()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import GenerationState

    manager = _manager(model, processor, name)
    limits = _for_model(limits, processor)
    shared = {"model_manager": manager, "generation_state": GenerationState(continuous_batching=False)}
    chat, responses = (_sampling(handler)(**shared) for handler in (ChatCompletionHandler, ResponseHandler))

    def route(check: Callable[[dict[str, Any], RequestLimits], dict[str, Any]], handler: Any) -> Any:
        async def answer(request: Request) -> Any:
            given = request.headers.get("x-request-id", "")
            request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
            raw = await _read(request, limits)
            # Pictures are decoded and fetched in a thread, so that other answers go on.
            body = await asyncio.to_thread(lambda: check(parse_body(raw), limits))
            response = await handler.handle_request(body, request_id)
            response.headers["x-request-id"] = request_id
            return response

        return answer

    async def models(request: Request) -> Any:
        return JSONResponse({"object": "list", "data": manager.get_gen_models()})

    async def health(request: Request) -> Any:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, error: Exception) -> Any:
        status = error.status if isinstance(error, RefusedRequest) else 400
        code = error.code if isinstance(error, RefusedRequest) else type(error).__name__
        return JSONResponse(_error(str(error), "invalid_request_error", code), status)

    async def http_error(request: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        body = _error(str(error.detail), "invalid_request_error", None)
        return JSONResponse(body, error.status_code, headers=error.headers)

    async def broken(request: Request, error: Exception) -> Any:
        return JSONResponse(_error("internal error; the server's log says more.", "server_error", None), 500)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        manager.shutdown()

    middleware = []
    if cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    if hosts is not None:
        middleware.append(Middleware(_KnownHosts, hosts=hosts))
    return Starlette(
        routes=[
            Route("/v1/chat/completions", route(check_chat, chat), methods=["POST"]),
            Route("/v1/responses", route(check_responses, responses), methods=["POST"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        middleware=middleware,
        exception_handlers={VlmeffError: refused, HTTPException: http_error, Exception: broken},
        lifespan=lifespan,
    )


def serve(
    model: str,
    preset: str | None = "fast",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    limits: RequestLimits | None = None,
    cors_origins: Sequence[str] = (),
    log_level: str = "warning",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Load ``model`` with ``preset`` (None leaves it unwrapped) and answer requests until interrupted.

    Raises:
        ConfigError: the address cannot be used, or an option has a value that cannot work.
        MissingExtraError, EnvironmentMismatchError: as ``check_environment``.
        VlmeffError: the model or the preset cannot be used.
    """
    check_environment()
    listening = _bind(host, port)  # before the model is loaded: a port in use is known at once
    with listening:
        import uvicorn

        from vlmeff import zoo
        from vlmeff.config import check_methods
        from vlmeff.loading import load

        if preset is not None:
            check_methods(zoo.resolve(model, preset).steps, None, {}, None)
        say(f"loading {model}")
        loaded, processor = load(model, preset, revision=revision, device=device, dtype=dtype)
        name = name or (Path(model).resolve().name if Path(model).is_dir() else model)
        local = host in LOOPBACK
        app = build_app(
            loaded,
            processor,
            name=name,
            limits=limits or RequestLimits(),
            hosts=LOOPBACK if local else None,
            cors_origins=cors_origins,
        )
        del loaded, processor
        logging.getLogger("transformers").setLevel(log_level.upper())
        if log_level == "warning":  # the level at which the handlers note every request
            logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            log_level=log_level,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GOODBYE_SECONDS,
        )
        if not local:
            say(f"warning: {host} is open to others without a password: put a proxy in front that asks for one.")
        shown = f"[{host}]" if ":" in host else host
        what = f"{name} with preset {preset}" if preset else name
        say(f"serving {what} at http://{shown}:{listening.getsockname()[1]}/v1")
        if threading.current_thread() is threading.main_thread():
            # uvicorn ends in good order and then raises the signal again: SIGTERM is a normal end.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        uvicorn.Server(config).run(sockets=[listening])


def _bind(host: str, port: int) -> socket.socket:
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(info[0], info[1])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} cannot be used: {error}.") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(info[4])
    except OSError as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port} cannot be used ({error}): choose another port.") from error
    return listening


def _manager(model: Any, processor: Any, name: str) -> Any:
    """transformers' keeper of models, holding one that is already loaded; it loads nothing by a client's word."""
    from transformers.cli.serving.model_manager import ModelManager

    class OneModel(ModelManager):
        def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
            return model_id  # the stock one appends @main

        def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
            return processor

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            return model

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            if model_id_and_revision != name:  # the handlers have checked; nothing else may be loaded here
                raise ConfigError(f"the model is {name!r}, not {model_id_and_revision!r}.")
            return super().load_model_and_processor(model_id_and_revision)

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
            """The one model; the stock one lists the machine's cache of the hub."""
            return [{"id": name, "object": "model", "created": 0, "owned_by": "vlmeff"}]

    return OneModel(force_model=name)


def _sampling(handler: type) -> type:
    """The handler, drawing at random where a temperature above 0 is asked for, which the stock one ignores."""

    class Sampling(handler):  # type: ignore[misc, valid-type]
        def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            config = super()._build_generation_config(body, *args, **kwargs)
            if body.get("temperature"):
                config.do_sample = True
            return config

    return Sampling


def _for_model(limits: RequestLimits, processor: Any) -> RequestLimits:
    """No pictures for a model that takes none; its placeholders are not for clients to write."""
    if not hasattr(processor, "image_processor"):
        return replace(limits, pictures=replace(limits.pictures, max_images=0))
    tokens = (getattr(processor, key, None) for key in ("image_token", "video_token", "audio_token"))
    return replace(limits, placeholders=tuple(t for t in tokens if isinstance(t, str) and t))


async def _read(request: Request, limits: RequestLimits) -> bytes:
    """The body, at most as long as the limit says.

    Raises:
        RefusedRequest: 415 other than plain JSON, 413 too long, 408 too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        # A page of another site can post texts and forms without being asked, but no JSON.
        raise RefusedRequest("send the body as application/json, not compressed.", status=415)
    too_long = RefusedRequest(
        f"the body has more than {limits.max_request_bytes} bytes (--max-request-mb).", status=413
    )
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limits.max_request_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_request_bytes:
                    raise too_long
    except TimeoutError:
        raise RefusedRequest(f"the body did not arrive within {BODY_SECONDS:g} s.", status=408) from None
    return bytes(body)


def _error(message: str, kind: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class _KnownHosts:
    """ASGI: answers 403 where the Host header names another machine."""

    def __init__(self, app: Any, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            value = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"host"), "")
            host = re.sub(r":\d*$", "", value).strip("[]").lower()
            if host not in self.hosts:
                from starlette.responses import JSONResponse

                message = f"this server answers to {', '.join(sorted(self.hosts))} alone."
                await JSONResponse(_error(message, "invalid_request_error", None), 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)
