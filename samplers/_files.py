"""Writing a file whole or not at all."""

import contextlib
import os
import secrets
import stat


def write_whole(path, content: bytes) -> None:
    """Write `content` to `path`. If that fails, an older file there stays as it was.

    Raises:
        ValueError: `path` exists and is not a regular file.
        OSError: the folder is missing or cannot be written to, or the disk is full.
    """
    path = os.path.realpath(path)  # a link stays a link
    mode = None
    if os.path.lexists(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file, so it is not overwritten: choose another path")
    beside = os.path.join(os.path.dirname(path), f".samplers-{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
