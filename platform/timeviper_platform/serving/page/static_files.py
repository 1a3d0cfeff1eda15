"""The page at `/`: three files that load nothing from other servers."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parent
SCRIPT, STYLE = "/page/app.js", "/page/style.css"
PATHS = ("/", SCRIPT, STYLE)
"""Paths that need no API key: the page asks its user for it."""
BASE = "<!-- base -->"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:;"
        " media-src 'self' blob:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> list[BaseRoute]:
    return [
        Route("/", _page, methods=["GET"]),
        Route(SCRIPT, _file("app.js", "text/javascript"), methods=["GET"]),
        Route(STYLE, _file("style.css", "text/css"), methods=["GET"]),
    ]


_PAGE = (FOLDER / "index.html").read_text(encoding="utf-8")


async def _page(request: Request) -> Response:
    """Returns the page with its address as the base of its links, which begins with the application's prefix."""
    prefix = html.escape(request.scope.get("root_path", "").rstrip("/"), quote=True)
    text = _PAGE.replace(BASE, f'<base href="{prefix}/">')
    return Response(text, headers=HEADERS, media_type="text/html; charset=utf-8")


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (FOLDER / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=f"{media_type}; charset=utf-8")

    return answer
