"""The application: routes, checks and errors."""

from __future__ import annotations

import asyncio
import html
import importlib.util
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from chargpt.base.version import __version__
from chargpt.serve.bridge import Bridge
from chargpt.serve.completions import router
from chargpt.serve.errors import ApiError
from chargpt.serve.metrics import Metrics
from chargpt.serve.models import Served
from chargpt.serve.safety import Guard, RequestLog
from chargpt.serve.settings import ServeSettings


def make_app(
    served: Mapping[str, Served],
    settings: ServeSettings | None = None,
    *,
    ready: threading.Event | None = None,
) -> FastAPI:
    """Return the application for some models.

    Args:
        served: by name. Models may still be added until `ready` is set.
        settings: limits and keys.
        ready: set when all models are loaded; None: they are.
    """
    settings = settings or ServeSettings()
    metrics = Metrics(served)
    middleware = [Middleware(RequestLog, metrics=metrics, write=settings.log_requests)]
    if settings.cors:
        methods, headers = ["GET", "POST"], ["authorization", "content-type", "x-api-key"]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors,
            allow_methods=methods,
            allow_headers=headers,
        )
        middleware.append(cors)
    middleware.append(Middleware(Guard, settings=settings))
    app = FastAPI(
        title="chargpt",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        middleware=middleware,
        lifespan=_lifespan,
    )
    app.state.served, app.state.settings, app.state.metrics = served, settings, metrics
    app.state.ready = ready
    app.include_router(router)
    _add_operations(app)
    _add_errors(app)
    if importlib.util.find_spec("chargpt.serve.playground"):
        playground = importlib.import_module("chargpt.serve.playground")
        playground.add_playground(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect the workers with this event loop as they come, and stop them at the end."""
    loop = asyncio.get_running_loop()
    app.state.connect = lambda served: setattr(served.worker, "pace", Bridge(loop))
    for served in app.state.served.values():
        app.state.connect(served)
    if loader := getattr(app.state, "load_all", None):
        loader.start()
    yield
    for served in [*app.state.served.values()]:
        served.worker.stop()


def _add_operations(app: FastAPI) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Return 200 when all models are loaded, 503 before."""
        ready = app.state.ready is None or app.state.ready.is_set()
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the counters as Prometheus reads them."""
        return Response(generate_latest(app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Show the routes; no script and nothing from elsewhere."""
        return HTMLResponse(_docs_page(app.openapi()))


def _docs_page(document: dict[str, Any]) -> str:
    rows = [
        f"<dt><code>{method.upper()} {html.escape(path)}</code></dt>"
        f"<dd>{html.escape(route.get('description', ''))}</dd>"
        for path, routes in document["paths"].items()
        for method, route in routes.items()
    ]
    schemas = []
    for name, schema in document["components"]["schemas"].items():
        fields = "".join(
            f"<dt><code>{html.escape(field)}</code></dt>"
            f"<dd>{html.escape(facts.get('description', ''))}</dd>"
            for field, facts in schema.get("properties", {}).items()
        )
        schemas.append(f"<h2>{html.escape(name)}</h2><dl>{fields}</dl>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>chargpt API</title>'
        f"<h1>chargpt API</h1><dl>{''.join(rows)}</dl>{''.join(schemas)}"
        '<p>In full: <a href="/openapi.json">openapi.json</a></p></html>'
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> Response:
        message = {404: "this path does not exist: see /docs"}.get(error.status_code)
        message = message or f"{error.detail}".lower()
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not JSON: send an object").response()
        name = place[0] if place else None
        message = f"{'.'.join(place[:4])[:80] or 'the body'}: {first['msg']}"
        return ApiError(400, message, param=name).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed: see its log").response()
