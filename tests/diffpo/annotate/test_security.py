"""Who is refused, and that nothing outside the pictures is ever sent."""

import asyncio
import re
from urllib.parse import unquote

import pytest
from annotated import HOST, client, make_session, write_pairs

from diffpo.annotate import app, security
from diffpo.annotate.security import Guard, rules
from diffpo.common.errors import DiffpoError

TOKEN = "correct-horse-battery-staple"  # noqa: S105
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotate")
    return make_session(folder / "votes", write_pairs(folder / "pairs"))


@pytest.fixture(scope="module")
def page(session):
    return client(session)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8765"}, 200),
        ({"host": "[::1]:1"}, 200),
        ({"host": "evil.example"}, 403),  # DNS rebinding
        ({"host": "127.0.0.1.evil.example:8765"}, 403),
        ({"host": "192.168.1.5:8765"}, 403),  # not an address of a server on loopback
        ({"host": ""}, 403),
        ({"origin": HOST}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),  # another server of this machine
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_hosts_and_origins(page, headers, status):
    body = {"annotator": "ada", "n": 0}
    assert page.post("/api/next", json=body, headers=headers).status_code == status
    assert page.get("/api/about", headers=headers).status_code == status


def test_a_link_from_another_page_opens_the_page_and_nothing_else(page):
    away = {"sec-fetch-site": "cross-site"}
    assert page.get("/", headers=away).status_code == 200
    assert page.get("/api/about", headers=away).status_code == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_a_form_of_another_page_cannot_vote(page, kind):
    headers = {} if kind is None else {"content-type": kind}
    assert page.post("/api/event", content=b"{}", headers=headers).status_code == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(page, method):
    assert page.request(method, "/api/event", content=b"{}", headers=JSON).status_code == 405


# ---- bodies


def sent(limit, chunks, length=None):
    """The status of a POST that comes in ``chunks``, and how many of them were taken."""
    taken, statuses = 0, []

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": chunks[taken - 1], "more_body": taken < len(chunks)}

    async def send(message):
        statuses.append(message.get("status"))

    async def inner(scope, receive, send):
        message = await receive()
        statuses.append(len(message["body"]))

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    headers += [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": "/api/event", "query_string": b"", "headers": headers}
    asyncio.run(Guard(inner, rules("127.0.0.1", None, limit))(scope, receive, send))
    return statuses[0], taken


def test_a_long_body_is_refused_as_it_comes_whatever_its_length_says():
    chunks = [b"x" * 100] * 50
    assert sent(1000, chunks[:10]) == (1000, 10)  # read whole, and given on
    assert sent(1000, chunks) == (413, 11)
    assert sent(1000, chunks, b"10") == (413, 11)  # a lie
    assert sent(1000, chunks, b"5000") == (413, 0)  # nothing is read
    for wrong in (b"-1", b"1e3", b"9" * 30, b"abc"):
        assert sent(1000, chunks, wrong) == (413, 0)


def test_a_body_that_never_comes_ends():
    async def never():
        await asyncio.sleep(60)

    found = []

    async def send(message):
        found.append(message.get("status"))

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/event", "query_string": b"", "headers": headers}
    slow = security.Rules(frozenset({"127.0.0.1"}), deadline=0.05)
    asyncio.run(Guard(None, slow)(scope, never, send))
    assert found[0] == 408


def test_headers_that_decide_may_not_be_there_twice(page):
    twice = [("host", "127.0.0.1"), ("host", "evil.example")]
    assert page.get("/", headers=twice).status_code == 400


# ---- the token


def test_without_the_token_nothing_is_sent(session):
    page = client(session, TOKEN, "0.0.0.0")  # noqa: S104
    key = next(iter(session.tasks.pictures))
    for path in ("/", "/page.js", "/api/about", f"/picture/{key}", "/?token=wrong-horse-battery-staple", "/?token="):
        assert page.get(path).status_code == 401, path
    assert page.post("/api/next", json={"annotator": "a", "n": 1}).status_code == 401
    name = rules("0.0.0.0", TOKEN).cookie  # noqa: S104
    for value, status in ((TOKEN[:-1], 401), (TOKEN + "x", 401), ("", 401), (TOKEN, 200)):
        page.cookies.set(name, value)
        assert page.get("/").status_code == status
    assert name != rules("0.0.0.0", TOKEN + "x").cookie  # noqa: S104 (two servers of one machine)


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_page_has(session, monkeypatch):
    compared = []
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    page = client(session, TOKEN, "0.0.0.0")  # noqa: S104
    answer = page.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    flags = {each.strip().lower() for each in answer.headers["set-cookie"].split(";")}
    name = rules("0.0.0.0", TOKEN).cookie  # noqa: S104
    assert {f"{name}={TOKEN}", "httponly", "samesite=strict", "path=/"} <= flags
    assert page.get("/").status_code == 200 and page.get("/api/about").status_code == 200
    assert compared and all(b == TOKEN.encode() for _, b in compared)  # in constant time


@pytest.mark.parametrize(
    ("host", "status"), [("192.168.1.5:8765", 401), ("[fe80::1]:8765", 401), ("evil.example", 403), ("localhost", 401)]
)
def test_a_server_for_others_has_addresses_as_names_but_no_foreign_names(session, host, status):
    assert client(session, TOKEN, "0.0.0.0").get("/", headers={"host": host}).status_code == status  # noqa: S104


def test_another_host_always_has_a_token():
    assert app.token_for("127.0.0.1", None) is None and app.token_for("::1", None) is None
    made = {app.token_for(host, None) for host in ("0.0.0.0", "192.168.1.5", "::", "my-machine")}  # noqa: S104
    assert len(made) == 4 and all(token and len(token) >= 43 for token in made)  # 256 bits
    assert app.token_for("127.0.0.1", TOKEN) == TOKEN
    for wrong in ("short", "a" * 20 + "&b=c", "\u00fc" * 20):
        with pytest.raises(DiffpoError, match="--token"):
            app.token_for("127.0.0.1", wrong)


# ---- files


@pytest.mark.parametrize(
    "path",
    [
        *("/picture/", "/picture", "/picture/..", "/picture/../page.js", "/picture/%2e%2e/%2e%2e/etc/passwd"),
        *("/picture/%2fetc%2fpasswd", "/picture/..%5cpairs.jsonl", "/picture/0-0.png", "/picture/" + "0" * 32),
        *(
            "/page/",
            "/page/page.js",
            "/app.py",
            "/../app.py",
            "/%2e%2e/app.py",
            "/votes.sqlite",
            "/pairs.jsonl",
            "/api/",
        ),
    ],
)
def test_only_the_page_and_listed_pictures_are_sent(session, path):
    """Asked for without a client that would tidy the path."""
    statuses = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"host", b"127.0.0.1")], "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}
    asyncio.run(app.application(session, rules("127.0.0.1", None))(scope, receive, send))
    assert statuses[0] in (404, 307)  # 307: /picture/KEY without its last slash


def test_every_answer_has_a_policy_that_allows_only_its_own_files(page, session):
    key = next(iter(session.tasks.pictures))
    for path in ("/", "/page.js", "/page.css", f"/picture/{key}", "/api/about", "/nothing"):
        headers = page.get(path).headers
        assert (
            "default-src 'none'" in headers["content-security-policy"]
            and headers["x-content-type-options"] == "nosniff"
        )
        assert "unsafe" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
    assert page.get("/", headers={"host": "evil.example"}).headers["content-security-policy"] == security.CSP
    html = page.get("/").text
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", html)


def test_names_and_arms_are_not_sent(page, session):
    given = page.post("/api/next", json={"annotator": "ada", "n": 20}).text
    assert "tasks" in given and not re.search(r"\.png|pairs|image_0", given)
