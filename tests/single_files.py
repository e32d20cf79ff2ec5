"""For tests of models that are one file."""

import json

import torch

from diffpo.config import Model


def model_of(file, folder, **options):
    return Model(path=str(file), config=str(folder), **options)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def sparse(path, shapes, metadata=None):
    """A safetensors file with these shapes in fp8, whose zeros take no place on the disk."""
    header, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
