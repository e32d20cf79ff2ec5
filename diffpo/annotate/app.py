"""The page and what it asks for, as a starlette application behind `security.Guard`.

    GET  /                  the page; /page.css, /page.js
    GET  /picture/KEY       a picture by the hash of its bytes
    GET  /api/about         {"show", "ask"}
    POST /api/next          {"annotator", "n", "have"}              -> {"tasks", "progress"}
    POST /api/event         a vote or an undo (`session.Session`)   -> {"new", "progress"}

An event that could not be stored is answered with 507: the browser keeps it and sends it again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import secrets
import socket
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.text import plain
from .security import Guard, Rules, is_loopback, rules
from .session import Refused, Session
from .store import CannotStore, Conflict

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {"/": "page.html"} | {f"/{path.name}": path.name for path in PAGE.glob("*.*") if path.suffix in (".css", ".js")}
MISSING = "`diffpo annotate` needs starlette and uvicorn: pip install 'diffpo[annotate]'"
LEAST = 16  # characters of a token


def needs() -> None:
    """DiffpoError if the extra is not installed."""
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise DiffpoError(MISSING)


def application(session: Session, rules: Rules) -> Any:
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def page(request: Any) -> Any:
        path = PAGE / FILES[request.url.path]
        return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers={"cache-control": "no-cache"})

    async def picture(request: Any) -> Any:
        kind, data = await asyncio.to_thread(session.picture, request.path_params["key"])
        # its name is a hash of its bytes, so it never changes; SVG and HTML are never sent
        return Response(data, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    async def about(request: Any) -> Any:
        found = {"show": session.tasks.show, "ask": session.tasks.ask}
        return JSONResponse(found, headers={"cache-control": "no-store"})

    async def following(request: Any) -> Any:
        sent = await _json(request)
        found = await asyncio.to_thread(session.next, sent.get("annotator"), sent.get("n"), sent.get("have", []))
        return JSONResponse(found, headers={"cache-control": "no-store"})

    async def event(request: Any) -> Any:
        return JSONResponse(await asyncio.to_thread(session.record, await _json(request)))

    async def refused(request: Any, error: Any) -> Any:
        return JSONResponse({"error": error.sentence}, error.status)

    async def not_stored(request: Any, error: Any) -> Any:
        return JSONResponse({"error": f"the vote is not stored: {error}"}, 507)

    async def conflict(request: Any, error: Any) -> Any:
        return JSONResponse({"error": str(error)}, 409)

    async def icon(request: Any) -> Any:
        return Response(status_code=204)

    routes = [Route("/favicon.ico", icon)]
    routes += [Route(path, page, methods=["GET"]) for path in FILES]
    routes += [Route("/picture/{key}", picture), Route("/api/about", about)]
    routes += [Route("/api/next", following, methods=["POST"]), Route("/api/event", event, methods=["POST"])]
    handlers: Any = {Refused: refused, CannotStore: not_stored, Conflict: conflict}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # no page is at another address: /picture/KEY/ is 404, not a redirect
    return Guard(app, rules)


async def _json(request: Any) -> dict[str, Any]:
    try:
        sent = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(sent, dict):
        raise Refused(400, "the body must be an object")
    return sent


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. DiffpoError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=256)
        # connections inherit it. asyncio sets it for sockets of protocol TCP only, and this one's is 0; without it the
        # second part of every answer waits 40 ms for the client's delayed acknowledgement
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except (OSError, OverflowError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
        raise DiffpoError(
            f"cannot listen on {host}:{port}: {reason}. Choose another --host, or another --port (0: a free one)"
        ) from None


def _own_address() -> str:
    """An address of this machine that others reach, because a phone may not know its name. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address that is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def token_for(host: str, token: str | None) -> str | None:
    """The token of a server: the given one; a new one where other machines can connect; else none."""
    if token is not None and len(token) < LEAST:
        raise DiffpoError(f"--token has {len(token)} characters, which can be guessed: give at least {LEAST}")
    if token is not None and (not token.isascii() or not token.replace("-", "").replace("_", "").isalnum()):
        raise DiffpoError(f"--token {plain(token, 60)!r} is part of an address: use letters, digits, '-' and '_'")
    return token or (None if is_loopback(host) else secrets.token_urlsafe(32))


def serve(session: Session, host: str = "127.0.0.1", port: int = 8765, token: str | None = None) -> None:
    """Answer until Ctrl-C. Without a ``token`` only this machine may connect; for another ``host`` one is made."""
    import uvicorn

    token = token_for(host, token)
    app = application(session, rules(host, token))
    with listen(host, port) as listening:
        address, number = listening.getsockname()[:2]
        shown = _own_address() if address in ("0.0.0.0", "::") else address  # noqa: S104 (not bound here)
        name = f"[{shown}]" if ":" in shown else shown
        given = f"?token={token}" if token else ""
        print(f"open http://{name}:{number}/{given} in a browser; Ctrl-C stops", flush=True)
        if not is_loopback(host):
            print("the connection is not encrypted: use it in a network that you trust, or through an SSH tunnel")
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
        options |= {"server_header": False, "timeout_graceful_shutdown": 5, "limit_concurrency": 512}
        try:
            uvicorn.Server(uvicorn.Config(app, http="h11", **options)).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises it again once everything is answered
            pass
