import pytest
from test_formats import save


@pytest.fixture
def private(tmp_path):
    """An image outside the data's folder."""
    return save(tmp_path / "private" / "mine.png", 9)


@pytest.fixture
def folder(tmp_path):
    """A folder of images 0 to 3."""
    for seed in range(4):
        save(tmp_path / "ds" / f"{seed}.png", seed)
    return tmp_path / "ds"
