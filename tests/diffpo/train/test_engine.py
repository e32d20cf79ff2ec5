"""What `accelerate launch` may ask of a run. Sharding itself: tests/invariant/test_processes.py."""

from types import SimpleNamespace

import pytest
import torch

from diffpo.common.errors import DiffpoError
from diffpo.models.dit import DiT
from diffpo.models.pixart import PixArt
from diffpo.models.sd import StableDiffusion
from diffpo.train import distributed
from diffpo.train.heldout import HeldOut


def launched(kind, counts=(), **plugin):
    """An accelerator as `accelerate launch` makes it; ``counts`` is what the processes together have."""
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_offload": None, **plugin}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings))
    gather = lambda here: torch.cat([here, torch.tensor(counts, dtype=here.dtype)])  # noqa: E731
    return SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), state=state, gather=gather, device=torch.device("cpu")
    )


REFUSED = {
    "lora: null": ["lora=null"],
    "lora.start": ["lora.start=some-lora"],
    "train.precision=fp16": ["train.precision=fp16"],
    "train.compile": ["train.compile=true"],
    "train.optimizer=bitsandbytes.optim.AdamW8bit": ["train.optimizer=bitsandbytes.optim.AdamW8bit"],
    "model.base_weights=fp8": ["model.base_weights=fp8"],
    "objective.reference.policy=ema": ["objective.reference.policy=ema"],
    "objective.source=inversion": ["objective.name=inpo"],
    "objective.source=trajectory": [
        "objective.name=d3po",
        "data.prompts=shapes:train:6",
        "objective.rollout.scorers=[shapes.total]",
    ],
    "objective.error=perceptual": ["objective.name=ncp_dpo"],
    "objective.weighting=measured": ["objective.weighting=measured"],
    "objective.users": ["objective.users=true", "data.columns.user=user"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_sharding_refuses_what_it_does_not_go_with(make_config, tmp_path, name):
    config = make_config(tmp_path, *REFUSED[name])
    with pytest.raises(DiffpoError, match=r"FSDP2 .*; use DDP") as error:
        distributed.check(config, PixArt, launched("FSDP"))
    assert name in str(error.value) and str(error.value).count(",") == 0
    distributed.check(config, PixArt, launched("MULTI_GPU"))
    distributed.check(config, PixArt, launched("NO"))


def test_sharding_takes_plain_runs_of_transformers_by_fsdp2(make_config, tmp_path):
    from torch.distributed.fsdp import CPUOffloadPolicy

    config = make_config(tmp_path, "train.precision=bf16", "train.gradient_checkpointing=true")
    distributed.check(config, PixArt, launched("FSDP"))
    assert distributed.loading_device(launched("FSDP")) == "cpu" and distributed.loading_device(
        launched("NO")
    ) == torch.device("cpu")
    unknown = SimpleNamespace(network_class="NewTransformer2DModel", fsdp2=None)
    for family, accelerator, said in (
        (StableDiffusion, launched("FSDP"), "UNet2DConditionModel"),
        (DiT, launched("FSDP"), "DiTTransformer2DModel"),
        (unknown, launched("FSDP"), "a NewTransformer2DModel, whose family does not set fsdp2"),
        (PixArt, launched("FSDP", fsdp_version=1), "--fsdp_version 2"),
        (PixArt, launched("FSDP", activation_checkpointing=True), "train.gradient_checkpointing=true does it"),
        (PixArt, launched("FSDP", cpu_offload=CPUOffloadPolicy()), "fsdp_offload_params"),
        (PixArt, launched("DEEPSPEED"), "DEEPSPEED"),
    ):
        with pytest.raises(DiffpoError, match=said):
            distributed.check(config, family, accelerator)


def test_processes_that_share_a_sharded_network_measure_equally_often():
    held_out = object.__new__(HeldOut)
    held_out.mine, held_out.rows, held_out.indices = list(range(5)), 2, [0, 1]
    held_out.batches = SimpleNamespace(portions=lambda items, index, rows: [[0, 1], [2, 3], [4]])

    def portions(kind, counts):
        held_out.accelerator = launched(kind, counts)
        return list(held_out._portions())

    mine = [([0, 1], True), ([2, 3], True), ([4], True)]
    assert portions("FSDP", [5, 1]) == [*mine, ([0], False), ([0], False)]
    assert portions("FSDP", [2, 1]) == mine
    assert portions("MULTI_GPU", [5, 1]) == mine


def test_what_is_not_finite_is_seen_on_every_process():
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf")])
    empty = torch.ones(0)  # of a tensor with fewer rows than there are processes
    assert distributed.finite([good, empty], launched("NO")) and not distributed.finite([good, bad], launched("NO"))
    assert not distributed.finite([torch.tensor([float("nan")])], launched("NO"))
    assert distributed.finite([good], launched("FSDP", counts=[1])) and not distributed.finite(
        [good], launched("FSDP", counts=[0])
    )
