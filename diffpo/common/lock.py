"""One run at a time in a folder: a lock that the system releases when the run's process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from .errors import DiffpoError
from .files import cannot_write

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

NAME = ".lock"
LONGEST = 300  # bytes of a lock file: process and machine
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems

_mine = threading.local()  # the locks of this thread: its verbs may nest


@contextlib.contextmanager
def held(folder: Path, file: Path | None = None) -> Iterator[None]:
    """A context in which no other run writes into ``folder``. The folder is made if it is missing, and removed if it
    stays empty.

    ``file`` is the lock, by default FOLDER/.lock; if it is given, the folder is not made. The lock file of a killed run
    stops nothing. Where the system or the file system has no locks, a message says so and the run goes on without.
    Raises DiffpoError at once if another run holds the lock, or if it cannot be written.
    """
    path = file or folder / NAME
    locks = _mine.__dict__.setdefault("locks", set())
    key = os.path.realpath(path)
    if key in locks:
        yield
        return
    try:
        made = not path.parent.exists()
        handle = _take(folder, path)
    except OSError as error:
        raise cannot_write(f"into {path.parent}", error) from None
    locks.add(key)
    try:
        yield
    finally:
        locks.discard(key)
        with contextlib.suppress(OSError):
            if handle is not None:
                path.unlink()  # while it is held: later it may be another run's
        if handle is not None:
            os.close(handle)
        with contextlib.suppress(OSError):
            if made:
                path.parent.rmdir()


def _take(folder: Path, path: Path) -> int | None:
    """The open lock file; None where there are no locks."""
    for attempt in range(10):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        if fcntl is None:
            _without(folder, "this system has none")
            return None
        try:
            handle = _open(path)
        except FileNotFoundError:  # a run that ended just now may have removed its folder
            if attempt == 9:
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, path):
                _sign(handle)
                return handle
        except BlockingIOError:
            problem = f"{folder} is in use by {_holder(handle)}. Wait until it ends, or choose another folder"
            os.close(handle)
            raise DiffpoError(problem) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                path.unlink()
            _without(folder, error.strerror or str(error))
            return None
        os.close(handle)  # a run that ended just now has removed this file
    raise DiffpoError(f"other runs keep starting in {folder}; choose another folder")


def _open(path: Path) -> int:
    careful = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | careful, 0o666)
    except PermissionError:
        if not os.access(path, os.R_OK):
            raise
        handle = os.open(path, os.O_RDONLY | careful)  # left by another user's run
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST:
        os.close(handle)
        raise DiffpoError(f"{path} is not a lock file of diffpo; move it away, or choose another folder")
    return handle


def _is(handle: int, path: Path) -> bool:
    """Is the open file still the one of that name?"""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode()[:LONGEST], 0)


def _holder(handle: int) -> str:
    """Who signed the lock, as far as can be read."""
    found = re.match(r"([0-9]{1,10}) ([\w.-]{1,255})\n", os.pread(handle, LONGEST, 0).decode(errors="replace"))
    if not found:
        return "another run"
    where = "" if found[2] == socket.gethostname() else f" on {found[2]}"
    return f"another run (process {found[1]}{where})"


def _without(folder: Path, why: str) -> None:
    print(f"{folder} cannot be locked ({why}): make sure that no other run writes there")
