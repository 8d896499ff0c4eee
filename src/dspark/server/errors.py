"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` with the fitting status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from dspark.common.errors import UserError

LOG = logging.getLogger("dspark.server")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LONGEST = 500  # characters of a message: it may quote what the client sent


class Told(BaseModel):
    """What went wrong: in words, its kind, the field, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer but the one asked for."""

    error: Told


RESPONSES: dict[int | str, dict[str, Any]] = {  # for the OpenAPI document
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer"},
}


class ApiError(Exception):
    """An answer other than the one asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads, as JSON or as an event of a stream."""
        kind = TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        message = str(self).encode("utf-8", "replace").decode()[:LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Say it in place of the application, and leave its code for the log."""
        _tell(scope, self)
        await self.response(scope, receive, send)


class ClientGone(ApiError):
    """The client closed the connection before its answer was whole."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_gone")


def _tell(scope: Scope, error: ApiError) -> None:
    call = scope.get("state", {}).get("call")  # of calls.py; an application under test may stand without it
    if call is not None:
        call.error = error.code or f"http_{error.status}"


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as an answer. What is no fault of the client's is logged, and told without its inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says more", code="internal_error")


def refusal(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request's fields, in one sentence."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body" and not str(part).startswith(("function-", "list["))]
    name = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{'.'.join(where)} is not known or not supported here; leave it out", param=name)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "missing":
        return ApiError(400, f"{'.'.join(where) or 'the body'} is missing; pass it", param=name)
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(where) or 'the body'}: {said}", param=name)


def install(app: FastAPI) -> None:
    """Make every error of `app` an OpenAI error."""

    def said(request: Request, error: ApiError) -> JSONResponse:
        _tell(request.scope, error)
        return error.response

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return said(request, refusal(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return said(request, ApiError(error.status_code, str(error.detail), headers=error.headers))

    async def other(request: Request, error: Exception) -> JSONResponse:
        return said(request, as_api_error(error))

    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, UserError):
        app.add_exception_handler(kind, other)
