"""Clients of the server that are slow, hang up or come in crowds, and the memory that they share."""

import asyncio
import socket
import struct
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from http_scorers import GOOD, Fixed, one, post, request, said, served, understood
from on_policy import Brightness

from diffpo.scorers import server as serve_scorer
from diffpo.scorers.server import connection


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(connection, "LINGER", 0.3)


def test_clients_that_hang_up_do_no_harm(capfd):
    with served(Brightness()) as server:
        for data in (b"", b"GE", request(length=999), request(length=10**7) + b" " * 10**6):
            for reset in (False, True):
                with socket.create_connection(server.server_address) as connection:
                    connection.sendall(data)
                    if reset:  # close with RST
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert post(server, one(GOOD))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n", request(length=999)])
def test_one_deadline_is_for_all_of_a_request(start):
    """Each byte comes before any time-out of a silence would end."""
    with served(Brightness(), deadline=0.3) as server:
        began = time.monotonic()
        with socket.create_connection(server.server_address, timeout=30) as slow:
            slow.settimeout(0.02)
            answer, rest = b"", iter(start)
            while not answer and time.monotonic() - began < 20:
                slow.sendall(bytes([next(rest, 65)]) if start else b"")
                try:
                    answer = slow.recv(2**16)
                except TimeoutError:
                    continue
        assert understood(answer)[0] == 408
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("count", [4, 300])
@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nA: ", request(length=10**6)])
def test_slow_clients_do_not_stop_another(capfd, count, start):
    with served(Brightness()) as server, ExitStack() as slow:
        assert post(server, one(GOOD))[0] == 200
        for _ in range(count):
            slow.enter_context(socket.create_connection(server.server_address)).sendall(start)
        threads = threading.active_count()
        assert post(server, one(GOOD)) == (200, {"scores": {"shapes.total": [1.0]}})
        assert threading.active_count() == threads
        end = time.monotonic() + 20
        while len(server.clients) > server.limits.connections and time.monotonic() < end:  # dropped ones still close
            time.sleep(0.01)
        assert len(server.clients) <= server.limits.connections
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_is_dropped_even_at_the_moment_its_request_comes():
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes with its result."""

    async def dropped(server):
        client = connection.Connection(None, None, 9.0)

        async def come():
            asyncio.get_running_loop().call_soon(server._drop, client)

        await server._wait(client, come())
        await asyncio.sleep(0)

    with serve_scorer.Server(Brightness(), port=0) as server, pytest.raises(asyncio.CancelledError):
        asyncio.run(dropped(server))


def held(server):
    return sum(len(client.body) for client in server.clients)


@pytest.mark.parametrize("sent", [2**17, 2**18 - 1])
def test_whoever_sends_slowly_makes_room_for_others(monkeypatch, sent):
    monkeypatch.setattr(serve_scorer, "PACE", 0.1)
    body = one(GOOD).encode().ljust(2**18)
    with served(Brightness(), max_bytes=2**18) as server, ExitStack() as opened:
        slow = [opened.enter_context(socket.create_connection(server.server_address)) for _ in range(20)]
        for each in slow:
            each.sendall(request(body=body)[: sent + 90])
        for k in range(3):
            assert understood(said(server, request(body=body)))[0] == 200
            assert held(server) <= serve_scorer.BODIES * server.limits.max_bytes
            slow[k].sendall(b" ")
        slow[0].settimeout(30)
        assert understood(slow[0].recv(2**16))[0] == 503  # the client tries again


class Waiting(SimpleNamespace):
    __hash__ = object.__hash__


def test_of_bodies_that_wait_for_each_other_the_last_one_makes_room():
    def client(began, body, missing):
        made = Waiting(began=began, moved=began, body=bytearray(body), missing=missing, answered=False)
        made.task = SimpleNamespace(cancel=lambda: dropped.append(began) or server.clients.discard(made))
        return made

    with serve_scorer.Server(Brightness(), port=0, limits=serve_scorer.Limits(max_bytes=100)) as server:
        for scored in (0, 50):
            dropped = []
            first, second, third = client(1, 130 - scored, 70), client(2, 130, 60), client(3, 130, 50)
            server.clients = {first, second, third, client(0, scored, 0)}
            waiting = asyncio.wait_for(server._room(first), 0.2)
            if scored:  # its memory will be free
                with pytest.raises(asyncio.TimeoutError):
                    asyncio.run(waiting)
                assert not dropped
            else:
                asyncio.run(waiting)
                assert dropped == [3]


def test_bodies_wait_for_memory_while_others_are_scored():
    go_on, found = threading.Event(), []
    body = one(GOOD).encode().ljust(2**20)
    with served(Fixed(lambda: go_on.wait() and {"fixed": [3]}), max_bytes=2**20, deadline=0.5) as server:
        asking = [threading.Thread(target=lambda: found.append(post(server, body))) for _ in range(9)]
        for each in asking:
            each.start()
        time.sleep(1)  # the deadline is for what the clients have to do
        assert held(server) <= serve_scorer.BODIES * server.limits.max_bytes and not found
        assert post(server, None, "/", "GET")[0] == 200
        go_on.set()
        for each in asking:
            each.join(60)
    assert found == [(200, {"scores": {"fixed": [3.0]}})] * len(asking)


@pytest.mark.parametrize("count", [3, 12])
def test_many_large_requests_at_once_are_all_answered(count):
    """More than memory holds; each is sent in small parts, so that all are on their way at the same time."""
    body, found = one(GOOD).encode().ljust(2**20), []

    def ask(server):
        data = request(body=body)
        with socket.create_connection(server.server_address, timeout=60) as connection:
            for start in range(0, len(data), 2**15):
                connection.sendall(data[start : start + 2**15])
            found.append(understood(connection.recv(2**16))[0])

    with served(Brightness(), max_bytes=2**20) as server:
        asking = [threading.Thread(target=ask, args=(server,)) for _ in range(count)]
        for each in asking:
            each.start()
        for each in asking:
            each.join(60)
    assert found == [200] * count
