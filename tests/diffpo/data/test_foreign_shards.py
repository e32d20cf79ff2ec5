"""Shards (tar files) from others: members of every kind, size and claim."""

import io
import tarfile

import pytest
from test_formats import load, seen
from test_shards import orpo_members

from diffpo.common.errors import DiffpoError


def members_of(path, *members):
    """A tar of (TarInfo, content), headers as they are given."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content) if content is not None else None)
    path.write_bytes(buffer.getvalue())
    return path


def info(name, size=0, kind=tarfile.REGTYPE, **more):
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    for key, value in more.items():
        setattr(made, key, value)
    return made


def whole(i=0):
    return [(info(name, len(value)), value) for name, value in orpo_members(i, 1)]


def test_members_of_every_kind(tmp_path):
    kinds = {
        tarfile.SYMTYPE: "a",
        tarfile.LNKTYPE: "b",
        tarfile.CHRTYPE: "c",
        tarfile.BLKTYPE: "d",
        tarfile.FIFOTYPE: "e",
    }
    odd = [(info(f"0001.{name}.png", kind=kind, linkname="/etc/passwd"), None) for kind, name in kinds.items()]
    named = [("../../0002.jpg_0.png", b"x"), ("/0003.jpg_0.png", b"x"), ("0004.pickle", b"x"), ("README", b"x")]
    more = [(info(name, len(content)), content) for name, content in named]
    path = members_of(tmp_path / "a.tar", *whole(), *odd, (info("d", kind=tarfile.DIRTYPE), None), *more)
    groups = load(path, bad_rows="skip")
    assert seen(groups) == [("cat 0", 1, (0, 1))] and len(groups.bad) == 2
    (remark,) = groups.remarks()
    assert remark.endswith("7 files: 0001.a.png, 0001.b.png, 0001.c.png and 4 more")


def test_members_that_claim_to_be_larger_than_the_file(tmp_path):
    for size in (2**33, 2**62):
        content = members_of(tmp_path / "a.tar", *whole()).read_bytes().rstrip(b"\0")
        content += bytes(-len(content) % 512)
        head = info("0001.jpg_0.png", size).tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(content + head + bytes(2048))
        with pytest.raises(DiffpoError, match=r"a\.tar"):
            load(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size", [2**33, -512])
def test_headers_of_gigabytes_or_of_negative_size(tmp_path, kind, size):
    head = bytearray(info("x", 0, kind).tobuf(tarfile.GNU_FORMAT))
    head[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(head)
        file.truncate(2**34)  # sparse, so the gigabytes could be read
    with pytest.raises(DiffpoError, match=r"a\.tar"):
        load(tmp_path / "a.tar")


def test_a_member_of_negative_size(tmp_path):
    head = bytearray(info("0000.jpg_0.png").tobuf(tarfile.GNU_FORMAT))
    head[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 256 + sum(head[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(head) + bytes(4096))
    with pytest.raises(DiffpoError, match=r"a\.tar"):
        load(tmp_path / "a.tar")
