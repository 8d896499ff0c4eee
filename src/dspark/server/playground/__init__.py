"""The page at `/`: files of this directory, served from memory, under a policy that lets nothing else in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Response

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NAMES = ("index.html", "page.css", "page.js", "column.js", "load.js", "stream.js", "icon.svg")
PATHS = frozenset({"/", *(f"/playground/{name}" for name in NAMES[1:])})


def install(app: FastAPI) -> None:
    """Serve the page; it holds no secret, so PATHS need no key: the page asks for one where the API does."""
    for name in NAMES:
        content = files(__name__).joinpath(name).read_bytes()
        media = f"{TYPES[name.rpartition('.')[2]]}; charset=utf-8"
        path = "/" if name == "index.html" else f"/playground/{name}"
        app.add_api_route(path, _answer(content, media), methods=["GET", "HEAD"], include_in_schema=False)


def _answer(content: bytes, media: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media, headers=HEADERS)

    return answer
