"""Hypothesis with a fixed seed, which writes nothing into the repository."""

import shutil
import tempfile
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir
from tiny import picture, png

HOME = tempfile.TemporaryDirectory(prefix="hypothesis-")
set_hypothesis_home_dir(HOME.name)
settings.register_profile(
    "fuzz", derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)
settings.load_profile("fuzz")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """make() returns a new folder with four images, and removes the one before."""
    root, numbers = tmp_path_factory.mktemp("sources"), count()
    pictures = [png(picture(seed, (8, 8))) for seed in range(4)]

    def make():
        for old in root.iterdir():
            shutil.rmtree(old)
        folder = root / str(next(numbers))
        folder.mkdir()
        for i, content in enumerate(pictures):
            (folder / f"{i}.png").write_bytes(content)
        return folder

    return make
