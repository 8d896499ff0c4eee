"""Routes whose body pydantic reads straight from its bytes: the way of every text, with nothing else on it."""

from __future__ import annotations

from typing import Any, get_type_hints

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from dspark.common.errors import UserError
from dspark.server.errors import ApiError, as_api_error, refusal


class DirectRoute(APIRoute):
    """A POST of `endpoint(body, request)`. It stands in the OpenAPI document as any route; FastAPI does not run it.

    An error is answered as `errors.install` would, so the response must raise nothing once it has begun.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, answer."""
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            body = self._read(await request.body(), request.headers.get("content-type", ""))
            response = await self.endpoint(body, request)
            await response(scope, receive, send)
        except (ApiError, UserError) as error:
            await as_api_error(error).answer(scope, receive, send)

    def _read(self, body: bytes, content_type: str) -> Any:
        """The endpoint's body. Raises ApiError 400: a page of another origin may send text, but no JSON, unasked."""
        kind = content_type.partition(";")[0].strip().lower()
        if not kind.startswith("application/") or not kind.endswith(("/json", "+json")):
            raise ApiError(400, f"the body is {kind or 'of no type'!r:.80}; send Content-Type: application/json")
        if not body:
            raise ApiError(400, "the body is missing; pass it")
        try:
            return self._model.model_validate_json(body)
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)[:1]]
            raise refusal(RequestValidationError(found)) from None

    @property
    def _model(self) -> Any:
        if not hasattr(self, "_body"):
            self._body = get_type_hints(self.endpoint)["body"]
        return self._body
