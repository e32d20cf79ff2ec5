"""For tests of votes: folders of pairs, a session over them, and requests to it."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

from diffpo.annotate import app, rows
from diffpo.annotate.assign import Plan
from diffpo.annotate.security import rules
from diffpo.annotate.session import Session
from diffpo.annotate.tasks import Picture, Task

HOST = "http://127.0.0.1:8765"


def picture(number: int, size=(24, 16)) -> Image.Image:
    """A picture that no other number has."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def write_pairs(folder, n=6, size=(24, 16), prompt="prompt {}"):
    """A folder of n pairs K-0.png, K-1.png with pairs.jsonl; the path of that."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(n):
        for side in (0, 1):
            picture(2 * k + side, size).save(folder / f"{k}-{side}.png")
        lines.append({"prompt": prompt.format(k), "image_0": f"{k}-0.png", "image_1": f"{k}-1.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path, table):
    """A parquet file of rows; its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def make_session(folder, source, plan=Plan(repeat=0.0), **about) -> Session:  # noqa: B008 (frozen)
    tasks = rows.of_rows(str(source), "train", about.pop("show", None), before=about.pop("before", None))
    tasks.ask = about.pop("ask", "best")
    session = Session(folder, tasks, plan)
    tasks.save(folder)
    return session


def made_tasks(n: int, k: int = 2, prior: float = 0.5) -> list[Task]:
    return [Task(f"{i:04d}", f"prompt {i}", tuple(Picture(f"{i}-{j}", "x") for j in range(k)), prior) for i in range(n)]


def vote(task: str, ranks, uid: str, annotator="ada", **about) -> dict:
    """What the page sends; ``ranks`` are of the pictures as shown."""
    event = {"kind": "vote", "uid": uid, "annotator": annotator, "task": task, "repeat": 0, "ranks": ranks}
    return event | {"bad": False, "ms": 1000} | about


def cast(session: Session, given: dict, winner: int | None, uid: str, annotator="ada", **about) -> dict:
    """Vote on a task of `Session.next` for a picture by its number in the task; None: a tie."""
    keys = [picture.key for picture in session.tasks.by_id[given["task"]].pictures]
    ranks = [1 if winner is None or key == keys[winner] else 2 for key in given["pictures"]]
    return session.record(vote(given["task"], ranks, uid, annotator, repeat=given["repeat"], **about))


def mask(size, box) -> str:
    """A PNG in base64, white in a box of pixels."""
    image = Image.new("L", size)
    image.paste(255, box)
    return base64.b64encode(png(image)).decode()


def client(session: Session, token=None, host="127.0.0.1", body=2**23):
    from starlette.testclient import TestClient

    return TestClient(app.application(session, rules(host, token, body)), base_url=HOST, follow_redirects=False)


@contextmanager
def served(session: Session, token=None, port=0):
    """The address of a real server in a thread."""
    import uvicorn

    with app.listen("127.0.0.1", port) as listening:
        made = app.application(session, rules("127.0.0.1", token))
        config = uvicorn.Config(made, log_level="warning", lifespan="off", ws="none", http="h11")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)
