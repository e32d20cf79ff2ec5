"""`diffpo serve-scorer`: a scorer behind a small HTTP protocol, for scorers that need another environment or machine.

    GET  /       -> {"protocol": 1, "scorer": ..., "names": [...], "optional": [...], "max_images": ..., ...}
    POST /score  {"images": [PNG in base64, ...], "prompts": [text, ...]}  -> {"scores": {name: [number, ...], ...}}

A number is null where a prompt does not ask for it. An error is {"error": one sentence} with its status. The client is
scorers/client.py, the page docs/serve_scorer.md. This folder needs Python 3.8 and Pillow only, so that it can be
imported where the scorer's own packages live.

One thread receives and answers all requests (`Connection`, and the coroutines of `Server`), so a slow client costs a
few kilobytes and no time of the others. Complete requests go to the `ScoringQueue`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterable
from typing import Any

from ...common.errors import DiffpoError
from .connection import CHUNK, HEAD, Connection
from .protocol import NAME, PROTOCOL, Limits, Refused
from .scoring import ScoringQueue

BODIES = 4  # of the largest size; so much of all bodies together is in memory
BACKLOG = 1024  # connections that the system may hold until they are accepted
PACE = 1.0  # s: a client that sends less than CHUNK in that time is slow, and is dropped if memory is short
GRACE = 30.0  # s: a scoring in progress may take that long to end when the server stops
LATE = (asyncio.TimeoutError, TimeoutError)  # two classes before Python 3.11
DEFAULTS = Limits()


class Server:
    """Listens from the start; `serve_forever` answers. ``port`` 0 takes a free one, see ``url``.

    ``scorer``: see `diffpo.scorers.Scorer`; it is called by one thread at a time. Raises DiffpoError if the scorer's
    names cannot be used or the address cannot be had.
    """

    def __init__(self, scorer: Any, host: str = "127.0.0.1", port: int = 8000, limits: Limits = DEFAULTS) -> None:
        for name in scorer.names or [""]:
            if not NAME.fullmatch(name):
                raise DiffpoError(f"the scorer's name {name!r} must consist of letters, digits, '.', '_' and '-'")
        self.limits, self.scoring = limits, ScoringQueue(scorer, limits)
        self.about: dict[str, Any] = {
            "protocol": PROTOCOL,
            "scorer": getattr(scorer, "spec", type(scorer).__name__),
            "names": list(scorer.names),
            "optional": sorted(scorer.optional),
            "max_images": limits.max_images,
            "max_bytes": limits.max_bytes,
            "max_pixels": limits.max_pixels,
            "sources": True,  # it takes them; earlier versions do not
        }
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except (OSError, OverflowError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while attempting")[0]
            raise DiffpoError(
                f"cannot listen on {host}:{port}: {reason}; choose another --host, or another --port (0: a free one)"
            ) from None
        self.server_address = self.socket.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}"
        # a web page whose name resolves to this machine would send that name (DNS rebinding)
        self.loopback = ipaddress.ip_address(self.server_address[0].partition("%")[0]).is_loopback
        self.hosts = {"localhost", "127.0.0.1", "[::1]", name.lower()}

        self.clients: set[Connection] = set()
        self.awaited: set[Connection] = set()  # those that the server waits for
        self.loop: Any = None
        self.asked_to_stop, self.ended = False, threading.Event()
        self.ended.set()

    # ---- the server's life

    def serve_forever(self) -> None:
        """Answer until `stop`; ends when what is being scored is answered, after GRACE seconds at the latest."""
        self.ended.clear()
        self.scoring.start()
        try:
            asyncio.run(self._serve())
        finally:
            self.scoring.stop()
            self.ended.set()

    async def _serve(self) -> None:
        self.wake = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(_say)
        listening = await asyncio.start_server(self._connected, sock=self.socket, limit=HEAD, backlog=BACKLOG)
        if not self.asked_to_stop:
            await self.wake.wait()
        print("stopping", file=sys.stderr, flush=True)
        listening.close()
        for client in list(self.awaited):
            self._drop(client)
        if self.clients:
            await asyncio.wait({client.task for client in self.clients if client.task}, timeout=GRACE)

    def stop(self) -> None:
        """Let `serve_forever` end. May be called from a signal handler or another thread."""
        self.asked_to_stop = True
        if self.loop and not self.ended.is_set():
            self.loop.call_soon_threadsafe(self.wake.set)

    def shutdown(self) -> None:
        """`stop`, and wait for the end; from another thread than that of `serve_forever`."""
        self.stop()
        self.ended.wait()

    def server_close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server_close()

    # ---- requests

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Connection(reader, writer, self.limits.deadline)
        self.clients.add(client)
        status = 200
        content: dict[str, Any] = {}
        try:
            try:
                if len(self.clients) > self.limits.connections and not self._drop_slowest(self.awaited):
                    raise Refused(503, "too many requests at a time; send it again later")
                status, content = await self._content(client)
            except Refused as refused:
                status, content = refused.status, {"error": refused.sentence}
            except asyncio.CancelledError:
                status, content = 503, {"error": "too many requests at a time; send it again later"}
            if status != 200:
                place = (writer.get_extra_info("peername") or ["?"])[0]
                print(f"{place}: {status} {content['error']}", file=sys.stderr, flush=True)
            client.answer(status, content)
            if not client.dropped:
                await self._wait(client, client.close())
        except (Refused, OSError, asyncio.CancelledError):  # the client has hung up, or never will
            pass
        finally:
            self.clients.discard(client)
            writer.transport.abort()
            client.task = None  # no cycle keeps the body in memory

    async def _content(self, client: Connection) -> tuple[int, dict]:
        """Status and answer to a request. Raises Refused."""
        await self._wait(client, client.head())
        size = client.body_size(self.hosts if self.loopback else None, self.limits.max_bytes)
        if size is None:
            return 200, self.about
        client.size = size
        if client.headers.get("expect") and client.version != "1.0":
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while client.missing:
            await self._room(client)
            await self._wait(client, client.receive())
        done = self.loop.create_future()
        self.scoring.put(client.body, done)
        return await done

    async def _wait(self, client: Connection, coroutine: Coroutine) -> None:
        """Wait for the client, which may be dropped meanwhile. Raises Refused when its time is over."""
        client.moved = time.monotonic()
        self.awaited.add(client)
        try:
            await asyncio.wait_for(coroutine, client.left)
            if client.dropped:  # before Python 3.12, wait_for swallows a cancellation that comes with its result
                raise asyncio.CancelledError
        except LATE:
            raise Refused(408, f"the request was not complete within {self.limits.deadline:g} s") from None
        finally:
            self.awaited.discard(client)
            client.left -= time.monotonic() - client.moved

    async def _room(self, client: Connection) -> None:
        """Wait until memory holds the next chunk of the client's body, beside the rest of all bodies that miss less:
        else many would begin and none could end. Slow clients are not waited for, and dropped where memory is short."""
        while True:
            late = time.monotonic() - PACE
            slow = {each for each in self.awaited if each.missing and each.moved < late}
            chunk, place = min(client.missing, CHUNK), (client.missing, client.began)
            first = [each for each in self.clients - slow if (each.missing, each.began) < place]
            room = BODIES * self.limits.max_bytes - sum(len(each.body) for each in self.clients)
            if chunk + sum(each.missing for each in first) <= room:
                return
            if not self._drop_slowest(each for each in slow if each.body) and chunk > room:
                holders = [each for each in self.clients if each.body]
                if all(each.missing and each not in self.awaited for each in holders):  # they wait for each other
                    self._drop(max(holders, key=lambda each: each.began))
            await asyncio.sleep(0.02)

    def _drop_slowest(self, clients: Iterable[Connection]) -> bool:
        slowest = min(clients, key=lambda each: (not each.answered, each.moved), default=None)
        if slowest:
            self._drop(slowest)
        return slowest is not None

    def _drop(self, client: Connection) -> None:
        self.awaited.discard(client)
        client.body, client.dropped = bytearray(), True
        if client.task:
            client.task.cancel()


def _say(_loop: Any, context: dict) -> None:
    """Print asyncio's reports, such as too many open files."""
    print(f"{context['message']}: {context.get('exception')!r}", file=sys.stderr, flush=True)


def serve(scorer: Any, host: str = "127.0.0.1", port: int = 8000, limits: Limits = DEFAULTS) -> None:
    """Answer requests for ``scorer`` until SIGINT or SIGTERM. To be called from the main thread; see `Server`."""

    def stop(*_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # once more: at once
        server.stop()

    with Server(scorer, host, port, limits) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        print(f"serving {', '.join(server.about['names'])} on {server.url}; Ctrl-C stops", flush=True)
        if not server.loopback:
            print("any machine that reaches this address can use the scorer: there is no password", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
