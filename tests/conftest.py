"""Tiny models and pairs for all tests."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tiny import make_sd, make_sdxl, pick_a_pic_rows, write_parquet

# they take longest: begun last, one of them would keep one worker busy while the others are done
FIRST = ("test_processes.py", "test_quickstart.py", "test_families.py", "test_assets.py", "test_docs_blocks.py")


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist, which begins with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish(session):
    freeze_imports()


def pytest_runtest_logfinish():
    freeze_imports()


def freeze_imports(seen=[0]):  # noqa: B006 (it remembers)
    """What imports made stays: else every training that collects garbage looks at a million objects."""
    if len(sys.modules) > seen[0] + 50:
        gc.collect()
        gc.freeze()
        seen[0] = len(sys.modules)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    return make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory) -> Path:
    return make_sd(tmp_path_factory.mktemp("models") / "sd-v", "v_prediction")


@pytest.fixture(scope="session")
def pairs_parquet(tmp_path_factory) -> Path:
    """12 pairs in Pick-a-Pic's columns, two of them ties."""
    return write_parquet(tmp_path_factory.mktemp("pairs") / "train.parquet", pick_a_pic_rows(12, ties=2))


@pytest.fixture(autouse=True, scope="session")
def _dataset_cache(tmp_path_factory):
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture
def make_config(tmp_path, tmp_path_factory, pairs_parquet):
    """make_config(model, "a.b=c", ...): a Config for a tiny model and tiny pairs, with a temporary cache and output."""
    from diffpo.config import load_config

    def make(model: Path, *overrides: str, data: Path = pairs_parquet):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {model}}}\n"
            f"data: {{train: {data}, resolution: 16, cache: {tmp_path_factory.getbasetemp() / 'cache'}}}\n"
            "lora: {rank: 4}\n"
            "objective: {name: diffusion_dpo, beta: 500}\n"
            "train: {steps: 4, batch_size: 4, lr: 1e-2, checkpoint_every: 2}\n"
            f"output: {tmp_path / 'run'}\n"
        )
        return load_config(recipe, overrides)

    return make


@pytest.fixture
def fresh_accelerate():
    """Resets the state of accelerate, which lasts as long as the process, for a test that changes the precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
