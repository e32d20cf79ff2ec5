"""`data.streaming` of a hub id: rows of a source that is too large to download, read once and in order into a copy.

Training draws groups in random order, resumes at any step and caches latents by content. It needs rows with numbers,
which a stream does not have. Streaming avoids the download of unused columns and of rows beyond ``data.limit``. Parquet
files are always copied (tables.Parquet).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..config import Data
from .files import column, undecoded
from .keys import content_key
from .tables import Arrow

ROWS = 1000  # rows per file of the copy; an interrupted copy repeats at most this many


class Stream:
    """The first ``data.limit`` rows of a hub id. `select_columns` copies them into ``data.cache``. Rows copied
    before are not read again, and a larger limit continues the copy. DiffpoError if the source cannot be streamed."""

    def __init__(self, source: str, split: str, data: Data, quiet: bool = True) -> None:
        import datasets

        stream = datasets.load_dataset(source, split=split, streaming=True)
        if "__key__" in (stream.column_names or ()):
            stream = stream.rename_columns({name: column(name) for name in stream.column_names})
        if stream.column_names is None:
            raise DiffpoError(
                f"{source} does not state its columns, which data.streaming needs: set data.streaming=false"
            )
        self.source, self.split, self.data, self.quiet, self._stream = source, split, data, quiet, stream
        self.column_names: list[str] = list(stream.column_names)

    def select_columns(self, names: Sequence[str]) -> Arrow:
        """Make the copy. DiffpoError if it cannot be written, or if there are no rows."""
        import datasets
        from tqdm.auto import tqdm

        names = list(dict.fromkeys(names))
        stream = undecoded(self._stream.select_columns(names))
        key = content_key(self.source, self.split, names, [])
        folder = Path(self.data.cache).expanduser() / f"rows-{key[:16]}"
        about = folder / "about.json"
        state: dict[str, Any] = {"rows": 0, "files": 0, "ended": False, "at": None}
        if about.exists():
            state = json.loads(about.read_text(encoding="utf-8"))
        if state["at"]:
            stream.load_state_dict(state["at"])
        limit = self.data.limit
        options = {"initial": state["rows"], "desc": f"copying {self.source}", "unit": "row", "delay": 1}
        with tqdm(total=limit, **options, disable=self.quiet) as bar:
            rows = iter(stream)
            while not state["ended"] and (limit is None or state["rows"] < limit):
                part = list(islice(rows, ROWS))
                state["ended"] = len(part) < ROWS
                if part:
                    path = folder / f"{state['files']:05d}.arrow"
                    _write(path, datasets.Dataset.from_list(part, features=stream.features))
                    state |= {"rows": state["rows"] + len(part), "files": state["files"] + 1}
                state["at"] = stream.state_dict()
                bar.update(len(part))
                _replace(about, json.dumps(state).encode())
        if not state["rows"]:
            raise DiffpoError(f"{self.source} has no rows")
        parts = [(folder / f"{n:05d}.arrow", min(ROWS, state["rows"] - n * ROWS)) for n in range(state["files"])]
        copy = Arrow(parts, names, trusted=True)
        return copy if limit is None else copy.select(range(min(limit, len(copy))))


def _write(path: Path, dataset: Any) -> None:
    import pyarrow as pa

    table, sink = dataset.data.table, pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    _replace(path, sink.getvalue())


def _replace(path: Path, content: Any) -> None:
    with writing(f"the copy of the rows {path}", "data.cache=FOLDER"):
        write_atomic(path, content, shared=True)
