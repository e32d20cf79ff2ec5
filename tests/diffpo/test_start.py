"""Training on from a LoRA: it is where the policy starts and what it is compared with."""

import pytest
import torch
from tiny import metrics_of

from diffpo import lora, models
from diffpo.errors import DiffpoError
from diffpo.train import train


@pytest.fixture
def start(tiny_sdxl, make_config, tmp_path):
    """A trained LoRA of rank 4, alpha 4."""
    return train(make_config(tiny_sdxl, f"output={tmp_path / 'first'}", "train.steps=2"))


def test_policy_and_reference_start_from_it(tiny_sdxl, make_config, start, tmp_path):
    config = make_config(tiny_sdxl, f"lora.start={start}", "train.lr=1e-12", "train.steps=2")
    train(config)
    first = metrics_of(config.output)[0]
    assert first["rewards/chosen"] == first["error/chosen_delta"] == 0.0 and first["grad_norm"] > 0
    # at no learning rate to speak of it stays what it was, which is not a fresh adapter's B = 0
    before, after = (lora.read_lora(path)[0] for path in (start, config.output))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert any(value.abs().max() > 1e-3 for name, value in after.items() if "lora_B" in name)


def test_the_error_of_the_reference_is_that_of_the_pipeline_with_the_lora(tiny_sdxl, make_config, start):
    config = make_config(tiny_sdxl, f"lora.start={start}")
    family = models.load(config.model)
    network = family.load_network()
    lora.add_lora(network, config.lora, family.lora_targets)
    lora.start_from(network, config.lora)
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    lora.load_lora(pipe, start)
    from diffpo import reference

    made = reference.make(config.objective.reference, network, started=True)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)  # the policy moves, the reference does not
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([100, 900])
    cond = {
        "prompt_embeds": torch.randn(2, 16, 32, generator=draw),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=draw),
        "time_ids": torch.full((2, 6), 16.0),
    }
    with made.on(network) as module:
        found = family.predict(module, x_t, t, cond)
    with torch.no_grad():
        expected, moved = family.predict(pipe.unet, x_t, t, cond), family.predict(network, x_t, t, cond)
    torch.testing.assert_close(found, expected)
    assert (moved - expected).abs().max() > 1e-3


def test_a_resumed_run_equals_a_straight_one(tiny_sdxl, make_config, start, tmp_path):
    straight, halves = (f"output={tmp_path / name}" for name in ("straight", "halves"))
    whole = train(make_config(tiny_sdxl, f"lora.start={start}", straight))
    train(make_config(tiny_sdxl, f"lora.start={start}", halves, "train.steps=2"))
    resumed = train(make_config(tiny_sdxl, f"lora.start={start}", halves))
    one, other = (lora.read_lora(path)[0] for path in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=8", r"has rank 4, and this run asks for 8: set lora.rank=4"),
        ("lora.alpha=2", r"has alpha 4, and this run asks for 2: set lora.alpha=4"),
        ("lora.targets=[to_q]", r"has targets .* asks for \['to_q'\]"),
    ],
)
def test_another_shape_is_refused_by_name(tiny_sdxl, make_config, start, override, said):
    with pytest.raises(DiffpoError, match=said):
        train(make_config(tiny_sdxl, f"lora.start={start}", override))


def test_another_models_lora_is_refused(tiny_sd, make_config, start):
    with pytest.raises(DiffpoError, match="was trained on another base model"):
        train(make_config(tiny_sd, f"lora.start={start}"))
