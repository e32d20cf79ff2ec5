"""Several processes: what accelerate's DDP and FSDP2 need from a run, and how sharded tensors are made whole again.

Under FSDP2 every process holds a part of each block's weights (DTensors), and gathers a block while it is computed. So
all processes must call the network equally often, and what a checkpoint keeps is gathered on all of them before one
writes it. Checkpoints are those of one process: a run may go on with or without sharding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.errors import DiffpoError
from ..common.text import plain
from ..config import Config
from ..weights.sharding import like

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..models import Family


def sharded(accelerator: Accelerator) -> bool:
    """Does `accelerate launch` ask for FSDP?"""
    return accelerator.distributed_type.value == "FSDP"


def check(config: Config, family: Family, accelerator: Accelerator) -> None:
    """DiffpoError if the run cannot be what `accelerate launch` asks for."""
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise DiffpoError(f"accelerate is set up for {kind}; use DDP (--multi_gpu) or FSDP2 (docs/scale.md)")
    if config.lora is not None and config.lora.text_encoders and accelerator.num_processes > 1:
        raise DiffpoError("lora.text_encoders trains on one process: set lora.text_encoders=false")
    if not sharded(accelerator):
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin, objective = accelerator.state.fsdp_plugin, config.objective
    if plugin.fsdp_version != 2:
        raise DiffpoError(
            "accelerate is set up for FSDP 1; add --fsdp_version 2 (configs/accelerate/fsdp2.yaml has it)"
        )
    refused = {
        f"a {family.network_class}": family.fsdp2 is False,
        f"a {family.network_class}, whose family does not set fsdp2": family.fsdp2 is None,
        "full fine-tuning (lora: null)": config.lora is None,
        "lora.start": config.lora is not None and config.lora.start is not None,
        "train.precision=fp16": config.train.precision == "fp16",
        f"train.optimizer={config.train.optimizer}": config.train.optimizer.startswith("bitsandbytes."),
        f"objective.reference.policy={objective.reference.policy}": objective.reference.policy
        not in ("adapter_off", "none"),
        f"objective.source={objective.source}": objective.source != "forward",
        f"objective.error={objective.error}": objective.error != "squared",
        f"objective.weighting={objective.weighting}": objective.weighting == "measured",
        "objective.users": bool(objective.users),
        f"model.base_weights={config.model.base_weights}": config.model.base_weights != "full",
        "model.offload": config.model.offload,
        "train.compile": config.train.compile,
        "log.samples": config.log.samples is not None,
        "fsdp_activation_checkpointing (train.gradient_checkpointing=true does it)": plugin.activation_checkpointing,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
    }
    if found := [name for name, there in refused.items() if there]:
        raise DiffpoError(f"FSDP2 does not work with {', '.join(found)}; use DDP (accelerate launch --multi_gpu)")


@contextlib.contextmanager
def by_main(accelerator: Accelerator, context: contextlib.AbstractContextManager) -> Iterator[None]:
    """The main process enters ``context``; what DiffpoError it gets there, all processes get."""
    problem = None
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                stack.enter_context(context)
            except DiffpoError as error:
                problem = str(error)
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise DiffpoError(problem)
        yield


def compile_blocks(family: Family, network: torch.nn.Module, **options: Any) -> None:
    """Compile each kind of repeated block once, by diffusers' regional compilation; ``options`` of torch.compile. After
    the LoRA is added. It is compiled again for the reference, for evaluation and for other sizes. DiffpoError if the
    blocks are not known."""
    network._repeated_blocks = list(family.known_blocks("train.compile=true"))
    try:
        network.compile_repeated_blocks(**options)
    except ValueError as error:  # none of them is in the network
        raise DiffpoError(f"train.compile=true is not possible: {plain(error, 300)}") from None


def loading_device(accelerator: Accelerator) -> torch.device | str:
    """Where a network is loaded: one that is sharded may fit on no device, and goes there block by block."""
    return "cpu" if sharded(accelerator) else accelerator.device


def prepare(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: Optimizer
) -> tuple[torch.nn.Module, Optimizer]:
    """The network as the policy is called (wrapped for DDP, sharded in place for FSDP2) and accelerate's optimiser. The
    parameters of a sharded one are new: `parameters`."""
    if not sharded(accelerator):
        # all processes read the same frozen weights, and gloo cannot send fp8
        frozen = [name for name, parameter in network.named_parameters() if parameter.itemsize == 1]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, frozen)
        return accelerator.prepare_model(network), accelerator.prepare_optimizer(optimizer)
    plugin = accelerator.state.fsdp_plugin
    # weights are in their precisions already, and autocast does the rest: sharding changes no number
    plugin.mixed_precision_policy = None
    return accelerator.prepare(network, optimizer)


def parameters(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """What ``optimizer`` trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` of a state that `whole` made."""
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for parameter in parameters(inner):
        values = inner.state.get(parameter, {})
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = like(value, parameter.detach())


def finite(tensors: Iterable[Tensor], accelerator: Accelerator) -> bool:
    """Are all numbers finite, on all processes?"""
    parts = [each.to_local() if hasattr(each, "to_local") else each for each in (t.detach() for t in tensors)]
    found = torch.stack([part.isfinite().all() for part in parts]).all()
    if sharded(accelerator):
        found = accelerator.gather(found.reshape(1)).all()
    return bool(found)
