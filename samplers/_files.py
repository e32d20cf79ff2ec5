"""Files: written whole or not at all."""

import contextlib
import os
import stat
import tempfile


def write_whole(path, content: bytes) -> None:
    """Put `content` in the place of `path`. If that fails, what stood there stays.

    Raises:
        ValueError: something that is not a regular file stands there.
        OSError: the folder is missing or cannot be written to, or the disk is full.
    """
    path = os.path.realpath(path)  # a link stays one
    if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file: it is not overwritten")
    handle, beside = tempfile.mkstemp(prefix=".samplers-", suffix=".tmp", dir=os.path.dirname(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, _usual_mode(path))
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _usual_mode(path: str) -> int:
    """Of the file that stands there, else what `open` would give a new one (mkstemp lets only the owner read)."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
