"""Files: written whole or not at all."""

import contextlib
import os
import secrets
import stat


def write_whole(path, content: bytes) -> None:
    """Put `content` in the place of `path`. If that fails, what stood there stays.

    Raises:
        ValueError: something that is not a regular file stands there.
        OSError: the folder is missing or cannot be written to, or the disk is full.
    """
    path = os.path.realpath(path)  # a link stays one
    mode = None
    if os.path.lexists(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file: it is not overwritten")
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
