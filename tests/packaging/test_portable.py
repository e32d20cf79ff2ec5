"""What Windows and macOS, and newer Pythons, need of the code: read from its syntax, since neither runs here."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for name in ("diffpo", "samplers") for path in (ROOT / name).rglob("*.py"))
# modules that Windows lacks
POSIX = {"crypt", "curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
# modules that 3.12 or 3.13 removed
REMOVED = {"aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "distutils", "imghdr", "imp", "lib2to3"}
REMOVED |= {"mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau"}
REMOVED |= {"telnetlib", "uu", "xdrlib"}
OF_POSIX = {"fork", "getuid", "geteuid", "getpgid", "killpg", "mkfifo", "nice", "setsid", "statvfs", "sysconf", "uname"}


@cache
def nodes_of(*kinds):
    trees = {path: ast.parse(path.read_text("utf-8"), path.name) for path in FILES}
    return [(path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, kinds)]


def places(kinds, fits):
    """FILE:LINE of every node of these kinds that ``fits``."""
    nodes = nodes_of(ast.Call, ast.Import, ast.ImportFrom, ast.Attribute)
    nodes = ((path, node) for path, node in nodes if isinstance(node, kinds))
    return {f"{path.relative_to(ROOT).as_posix()}:{node.lineno}" for path, node in nodes if fits(node)}


def imported(node):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return set() if getattr(node, "level", 0) else {name.partition(".")[0] for name in names}


def without_encoding(call):
    """Whether it reads or writes a file as text without one."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    if isinstance(call.func, ast.Attribute):
        return (name == "read_text" and not call.args) or name == "write_text"
    mode = call.args[1] if len(call.args) > 1 else None
    return name == "open" and not (isinstance(mode, ast.Constant) and "b" in mode.value)


def test_text_is_read_and_written_as_utf_8():
    """Without an encoding Windows uses its own."""
    assert without_encoding(ast.parse("path.read_text()").body[0].value)
    assert without_encoding(ast.parse("open(path)").body[0].value)
    assert not places(ast.Call, without_encoding)


def test_no_module_is_imported_that_windows_or_a_newer_python_lacks():
    found = places((ast.Import, ast.ImportFrom), lambda node: imported(node) & (POSIX | REMOVED))
    assert {place.partition(":")[0] for place in found} == {"diffpo/common/lock.py"}  # unless on Windows
    assert not places((ast.Import, ast.ImportFrom), lambda node: "multiprocessing" in imported(node))
    assert not places(ast.Attribute, lambda node: node.attr in OF_POSIX and getattr(node.value, "id", "") == "os")


def test_a_folder_is_written_where_there_are_no_locks(tmp_path):
    """As on Windows: `sys.platform` says so, and fcntl cannot be imported."""
    program = """
import sys
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None
from pathlib import Path
from diffpo.common import files, lock
home = Path(sys.argv[1])
with lock.held(home / "run"):
    files.write_atomic(home / "run" / "a", b"1")
with files.whole_folder(home / "b") as part:
    (part / "c").write_bytes(b"2")
assert (home / "run" / "a").read_bytes() + (home / "b" / "c").read_bytes() == b"12"
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_folder_replaces_an_empty_one_as_windows_needs_it(tmp_path, monkeypatch):
    """There `os.replace` takes no folder as its target, and `os.open` opens none."""
    from diffpo.common import files

    replace, opened = files.os.replace, files.os.open

    def replace_of_windows(source, target):
        if Path(target).is_dir():
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    def open_of_windows(path, flags, *rest):
        if Path(path).is_dir() or not flags & files.os.O_RDWR:  # fsync refuses what is open for reading alone
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    class OfWindows:
        name, replace, open = "nt", staticmethod(replace_of_windows), staticmethod(open_of_windows)

        def __getattr__(self, name):
            return getattr(os, name)

    os = files.os
    monkeypatch.setattr(files, "os", OfWindows())
    (tmp_path / "b").mkdir()
    for content in (b"2", b"3"):
        with files.whole_folder(tmp_path / "b", replace=content == b"3") as part:
            (part / "c").write_bytes(content)
        assert (tmp_path / "b" / "c").read_bytes() == content


def test_names_of_files_work_on_windows_and_on_macos():
    """No names that Windows refuses, and no two that differ in case alone."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)  # noqa: S607
    tracked = listed.stdout.split("\0")[:-1]
    if not tracked:
        pytest.skip("not a clone")
    reserved = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
    parts = {part for path in tracked for part in path.split("/")}
    assert not [each for each in parts if re.search(r'[<>:"|?*\\\x00-\x1f]|[. ]$', each) or reserved.fullmatch(each)]
    assert len({path.lower() for path in tracked}) == len(tracked)
    assert max(map(len, tracked)) < 150  # of the 260 characters that Windows takes
