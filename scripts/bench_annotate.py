"""Load and crashes of `diffpo annotate`: many annotators vote over HTTP while the server's process is killed.

    python scripts/bench_annotate.py                  # 20 annotators x 200 votes, without kills and with 50
    python scripts/bench_annotate.py --out load.json

Every annotator is a thread that asks for a task, fetches its pictures and posts a vote. A vote whose answer does not
come is posted again, as the page does; every tenth vote is posted twice on purpose. At random votes the process gets
SIGKILL and is started again. Afterwards the store is compared with what was confirmed: lost, and there twice.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from diffpo.annotate.store import Store

PIXELS = 512


@dataclass
class Server:
    """A server process that can be killed and started again on the same port."""

    source: Path
    out: Path
    annotators: int
    port: int = 0
    process: subprocess.Popen | None = None
    starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def start(self) -> None:
        began = time.monotonic()
        command = [sys.executable, "-m", "diffpo.cli", "annotate", str(self.source), "--out", str(self.out)]
        command += ["--port", str(self.port), "--annotators-per-task", str(self.annotators), "--repeat", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while "open http" not in (line := self.process.stdout.readline()):
            if not line:
                raise SystemExit("the server does not start")
        self.starts.append(time.monotonic() - began)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Annotator:
    """Votes until there is nothing left for it. ``confirmed``: ids whose answer came; ``seconds``: of posts."""

    name: str
    port: int
    count: threading.Semaphore
    confirmed: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retries: int = 0
    connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        rng = random.Random(self.name)
        while True:
            asked = json.dumps({"annotator": self.name, "n": 1, "have": []})
            tasks = json.loads(self.ask("POST", "/api/next", asked)[0])["tasks"]
            if not tasks:
                return
            for key in tasks[0]["pictures"]:
                self.ask("GET", f"/picture/{key}")
            event = {
                "kind": "vote",
                "uid": f"{rng.getrandbits(64):016x}",
                "annotator": self.name,
                "ms": 900,
                "bad": False,
            }
            event |= {
                "task": tasks[0]["task"],
                "repeat": tasks[0]["repeat"],
                "ranks": rng.choice([[1, 2], [2, 1], [1, 1]]),
            }
            for _ in range(2 if rng.random() < 0.1 else 1):
                _, seconds = self.ask("POST", "/api/event", json.dumps(event))
                self.seconds.append(seconds)
            self.confirmed.append(event["uid"])
            self.tasks.append(event["task"])
            self.count.release()

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[bytes, float]:
        """The answer, and the seconds of the try that succeeded."""
        while True:
            began = time.monotonic()
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                    self.connection.connect()
                    self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as browsers do
                self.connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
                reply = self.connection.getresponse()
                data = reply.read()
            except (OSError, http.client.HTTPException):
                self.connection = None
                self.retries += 1
                time.sleep(0.05)
                continue
            if reply.status != 200:
                raise SystemExit(f"{method} {path}: {reply.status} {data[:200]!r}")
            return data, time.monotonic() - began


def measure(source: Path, out: Path, annotators: int, votes: int, kills: int, seed: int) -> dict:
    """One run, and what the store holds after it."""
    server, count, rng = Server(source, out, annotators), threading.Semaphore(0), random.Random(seed)
    server.start()
    people = [Annotator(f"annotator {k}", server.port, count) for k in range(annotators)]
    threads = [threading.Thread(target=each.run, daemon=True) for each in people]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    moments = sorted(rng.sample(range(1, annotators * votes), kills))
    seen = 0
    for moment in moments:
        while seen < moment:
            count.acquire()
            seen += 1
        time.sleep(rng.random() * 0.02)  # in the middle of whatever is going on
        server.kill()
        server.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    server.kill()
    store = Store(out)
    stored = Counter(event.uid for event in store.events())
    live = Counter((vote.annotator, vote.task) for vote in store.votes())
    confirmed = [uid for each in people for uid in each.confirmed]
    posts = np.array([each for person in people for each in person.seconds]) * 1000
    twice = sum(n > 1 for n in stored.values()) + sum(n > 1 for n in live.values())
    twice += sum(n > 1 for person in people for n in Counter(person.tasks).values())
    return {
        "annotators": annotators,
        "votes": len(confirmed),
        "wanted": annotators * votes,
        "kills": kills,
        "posts": len(posts),
        "retries": sum(each.retries for each in people),
        "lost": len(set(confirmed) - set(stored)),
        "twice": twice,
        "stored": sum(stored.values()),
        "not confirmed": len(set(stored) - set(confirmed)),
        "integrity": store.db.execute("PRAGMA integrity_check").fetchone()[0],
        "seconds": round(seconds, 1),
        "votes per second": round(len(confirmed) / seconds, 1),
        "post p50 ms": round(float(np.quantile(posts, 0.5)), 1),
        "post p99 ms": round(float(np.quantile(posts, 0.99)), 1),
        "start s": round(float(np.mean(server.starts)), 2),
    }


def make_source(folder: Path, n: int) -> Path:
    """n pairs of noise, PIXELS wide, as JPEG."""
    rng, lines = np.random.default_rng(0), []
    folder.mkdir()
    for k in range(n):
        for side in (0, 1):
            small = rng.integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(small).resize((PIXELS, PIXELS)).save(folder / f"{k}-{side}.jpg")
        lines.append({"prompt": f"pair {k}", "image_0": f"{k}-0.jpg", "image_1": f"{k}-1.jpg"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--votes", type=int, default=200, help="of each annotator")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_source(folder / "pairs", args.votes)
        for kills in dict.fromkeys((0, args.kills)):
            rows.append(measure(source, folder / f"votes-{kills}", args.annotators, args.votes, kills, args.seed))
            print("\n".join(f"{key:18} {value}" for key, value in rows[-1].items()), end="\n\n", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
