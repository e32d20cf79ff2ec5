import numpy as np
import pytest
from noisy_arms import CAPTIONS, save_arm

from diffpo import shapes


@pytest.fixture
def folder(tmp_path):
    """The base arm shows noisy scenes, the tuned arm the same scenes clean: a tuned model that must win everywhere."""
    rng = np.random.default_rng(0)
    clean = [shapes.render(shapes.parse(caption), rng) for caption in CAPTIONS]
    noisy = [np.clip(p + rng.normal(0, 12, p.shape), 0, 255).astype(np.uint8) for p in clean]
    save_arm(tmp_path, "base", noisy)
    save_arm(tmp_path, "tuned", clean)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    return tmp_path
