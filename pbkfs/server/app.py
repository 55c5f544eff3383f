"""The application: routes, errors and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import pbkfs
from pbkfs.errors import PbkfsError
from pbkfs.server import branches, problems, system, trunks
from pbkfs.server.control import Control
from pbkfs.server.guard import OPEN_PATHS, PREFIX
from pbkfs.server.models import Problem


def make_app(control: Control) -> FastAPI:
    """Return the application without its guard."""
    app = FastAPI(
        title="pbkfs",
        version=pbkfs.__version__,
        description="Trunks and branches: writable PostgreSQL servers of backups, in a second.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.control = control
    app.include_router(system.router)
    app.include_router(trunks.router, prefix=PREFIX)
    app.include_router(branches.router, prefix=PREFIX)
    app.add_exception_handler(PbkfsError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_status)
    app.add_exception_handler(Exception, _answer_bug)  # the guard logs it
    original = app.openapi
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_complete(original()))
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """Say what FastAPI can't know: our problems in the place of its own errors, and the token."""
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas[Problem.__name__] = Problem.model_json_schema()
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}, {}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            given = operation["responses"].get("422", {}).get("content", {})
            if "application/json" in given:
                del operation["responses"]["422"]
            if path in OPEN_PATHS:
                operation["security"] = []
                operation["responses"].pop("401", None)
    return document


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PbkfsError)
    return _response(problems.of_error(error))


async def _answer_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(problems.of_validation(error.errors()))


async def _answer_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    if error.status_code in (404, 405):
        problem = problems.of_status(
            error.status_code,
            f"{place} is not part of the interface",
            "GET /api/v1/openapi.json says what is.",
        )
    elif error.status_code == 400:
        problem = problems.of_validation([{"msg": str(error.detail)}])
    else:
        problem = problems.of_status(error.status_code, f"{place}: {error.detail}")
    response = _response(problem)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        # Of its own it names the methods of the first route only.
        response.headers["allow"] = ", ".join(_methods_of(request)) or "GET"
    return response


def _methods_of(request: Request) -> list[str]:
    """Return the methods that the document has for a request's path."""
    parts = request.url.path.split("/")
    found: set[str] = set()
    for path, operations in request.app.openapi()["paths"].items():
        known = path.split("/")
        if len(known) == len(parts) and all(
            part == wanted or wanted.startswith("{")
            for part, wanted in zip(parts, known, strict=True)
        ):
            found |= {method.upper() for method in operations}
    return sorted(found)


async def _answer_bug(_request: Request, _error: Exception) -> Response:
    return _response(problems.of_bug())


def _response(problem: Problem) -> Response:
    return Response(
        problems.encode(problem), status_code=problem.status, headers=problems.headers(problem)
    )
