"""`data.streaming` of a hub id: rows of a source that is too large to download, read once, in order, into a copy.

Training draws its groups in any order, resumes anywhere and caches latents by content, so it needs rows that it can
find again; a stream has none. What streaming saves is all that is not needed: other columns, and rows beyond
``data.limit``. (Of parquet files there is such a copy anyway: tables.Parquet.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..config import Data
from .cache import content_key
from .columns import find_columns, image_columns
from .files import column, undecoded
from .tables import Arrow

ROWS = 1000  # in a file of the copy; after an interruption at most so many are read again


def copied(source: str, split: str, data: Data, quiet: bool = True) -> Arrow:
    """The first ``data.limit`` rows of a hub id, copied into ``data.cache``; what is there already is not read again,
    and a larger limit goes on from it. DiffpoError if the source cannot be streamed."""
    import datasets
    from tqdm.auto import tqdm

    stream = datasets.load_dataset(source, split=split, streaming=True)
    if "__key__" in (stream.column_names or ()):
        stream = stream.rename_columns({name: column(name) for name in stream.column_names})
    if stream.column_names is None:
        raise DiffpoError(
            f"data.streaming needs a source that tells its columns before it is read, and {source} does not"
        )
    kind, columns = find_columns(source, stream.column_names, data.columns)
    names = [name for name in dict.fromkeys(columns.model_dump().values()) if name]
    stream = undecoded(stream.select_columns(names), image_columns(kind, columns))
    key = content_key(source, split, names, [])
    folder = Path(data.cache).expanduser() / f"rows-{key[:16]}"
    about = folder / "about.json"
    state = json.loads(about.read_text()) if about.exists() else {"rows": 0, "files": 0, "ended": False, "at": None}
    if state["at"]:
        stream.load_state_dict(state["at"])
    part: list[dict] = []
    enough = data.limit or float("inf")
    options = {"initial": state["rows"], "desc": f"copying {source}", "unit": "row", "delay": 1, "disable": quiet}
    with tqdm(total=data.limit, **options) as bar:
        rows = iter(stream)
        while not state["ended"] and state["rows"] < enough:
            for row in rows:
                part.append(row)
                if len(part) == ROWS:
                    break
            else:
                state["ended"] = True
            if part:
                _write(
                    folder / f"{state['files']:05d}.arrow", datasets.Dataset.from_list(part, features=stream.features)
                )
                state |= {"rows": state["rows"] + len(part), "files": state["files"] + 1}
            state["at"] = stream.state_dict()
            bar.update(len(part))
            part = []
            _replace(about, json.dumps(state).encode())
    if not state["rows"]:
        raise DiffpoError(f"{source} has no rows")
    parts = [(folder / f"{n:05d}.arrow", min(ROWS, state["rows"] - n * ROWS)) for n in range(state["files"])]
    return Arrow(parts, names, trusted=True)


def _write(path: Path, dataset: Any) -> None:
    import pyarrow as pa

    table, sink = dataset.data.table, pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    _replace(path, sink.getvalue())


def _replace(path: Path, content: Any) -> None:
    with writing(f"the copy of the rows {path}", "data.cache=FOLDER"):
        write_atomic(path, content, shared=True)
