"""The displacement score against what one step of gradient descent does, and the filter that it drives."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffpo import models
from diffpo.config import Model
from diffpo.data.judgement import Judgement
from diffpo.labelling import displacement
from diffpo.labelling.displacement import Filter
from diffpo.labelling.pictures import Picture, Prompted
from diffpo.labelling.rows import Row
from diffpo.problems.regression import Conditioning, Regression

BETA, STEP = 500.0, 1e-2


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_the_gradient_score_is_the_change_of_the_error_by_one_step(tiny_folder, name):
    """-log sigma(u) at u = 0, differentiated by autograd through the whole objective. The error is quadratic in the
    last layer's weights, so half the difference of a step forth and one back is its first-order change."""
    family = models.load(Model(path=str(tiny_folder(name))))
    network = family.load_network()
    shape = family.latent_shape(network, 16)
    draw = torch.Generator().manual_seed(0)
    x_t, target = (torch.randn(2, *shape, generator=draw) for _ in range(2))
    family.load_encoders()
    text = family.encode_text(["a cat", "a cat"])
    cond = family.condition(text, torch.full((2, 6), 16.0))
    t = torch.tensor([300, 300])
    judgement = Judgement(torch.ones(1))
    regression = Regression(x_t, t, target, Conditioning(cond), judgement)

    def errors():
        prediction = family.predict(network, x_t, t, cond)
        return (prediction - target).square().flatten(1).mean(1)

    _, gradient = displacement.scores(family, network, regression)
    layer = network.conv_out if hasattr(network, "conv_out") else network.proj_out
    before = errors().detach()
    layer.weight.requires_grad_(True)
    better, worse = errors()
    u = BETA / 2 * ((before[0] - better) - (before[1] - worse))
    (slope,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(u), layer.weight)
    layer.weight.requires_grad_(False)
    layer.weight -= STEP * slope
    forth = float(errors()[0])
    layer.weight += 2 * STEP * slope
    assert (forth - float(errors()[0])) / 2 == pytest.approx(BETA * STEP / 4 * float(gradient), rel=1e-2)
    assert float(gradient) != 0
    assert not layer.weight.requires_grad


def test_hidden_is_the_formula_of_ches():
    features = torch.tensor([[1.0, 2.0], [0.0, 3.0], [3.0, 4.0], [1.0, 1.0]])  # better, better, worse, worse
    assert displacement._ches(features).tolist() == [1 * 3 + 2 * 4 - 5, 0 * 1 + 3 * 1 - 9]


def test_the_filter_drops_the_pairs_with_the_largest_score(tiny_sd, tmp_path):
    rng, rows = np.random.default_rng(0), []
    for index in range(5):
        pictures = []
        for k in range(2):
            path = tmp_path / f"{index}-{k}.png"
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
            pictures.append(Picture("base", k, path))
        prompt = Prompted(index, f"prompt {index}", tuple(pictures), np.zeros((2, 0)))
        rows.append(Row(prompt, (0, 1), 0.5 if index == 4 else float(index % 2), (0.0, 1.0), 1.0))
    model = Model(path=str(tiny_sd))
    every, said = displacement.add(rows, Filter(0.0, model), tmp_path / "out")
    assert len(every) == 5 and not said
    scores = [row.displacement for row in every]
    assert scores[4] is None  # a tie pushes nothing
    kept, said = displacement.add(rows, Filter(0.5, model), tmp_path / "out")
    assert "2 of 5 pairs" in said[0]
    half, _ = displacement.add(rows, Filter(0.0, model, "bf16"), tmp_path / "half")
    np.testing.assert_allclose([row.displacement for row in half[:4]], scores[:4], rtol=0.1)
    lowest = sorted(scores[:4])[:2]
    assert [row.displacement for row in kept] == [each for each in scores if each is None or each in lowest]
