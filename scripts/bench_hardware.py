"""Pairs per second and peak memory of LoRA Diffusion-DPO, by batch size, with and without gradient checkpointing.

python scripts/bench_hardware.py --model sdxl [--batch-sizes 1 2 4 8] [--resolution 1024] [--out hardware-sdxl.md]

The network has the published config and random weights, so nothing is downloaded: sdxl (2.57 B parameters), sd15 (0.86
B), sd3 (SD3 medium, an MMDiT of 2.03 B), or tiny (assets/tiny-sdxl's). `--device cpu` computes on the CPU, which is
meant for tiny, to see that all works: memory is then the most that the process had resident. An update is that of
`diffpo train` from caches, with random numbers for latents and embeddings: policy and reference see both images of each
pair. On a GPU memory is the most that torch had allocated, weights included; nvidia-smi shows more (the allocator's
reserve, CUDA).
"""

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import diffusers
import torch
from published_networks import MODELS, make_family, make_network

from diffpo.common import tables
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import Draws
from diffpo.config import Lora, ObjectiveSettings, Train
from diffpo.data.judgement import Judgement
from diffpo.objective import reference
from diffpo.objective.reward import Objective
from diffpo.problems.forward import Forward
from diffpo.problems.policy import Policy
from diffpo.train.build import make_accelerator, make_optimizer, make_schedule
from diffpo.train.update import Updater
from diffpo.weights import lora


class Synthetic:
    """A `feeds.Feed` of random latents and conditions of the right shapes, noised as in training."""

    def __init__(self, family, network, resolution: int, device) -> None:
        self.family, self.network, self.resolution, self.device = family, network, resolution, device

    def begin(self, step: int) -> dict:
        return {}

    def regression(self, positions):
        n, device = len(positions), self.device
        x_t, _, cond = self.family.meta_inputs(self.network, 2 * n, self.resolution)
        cond = {name: torch.randn(value.shape, device=device, dtype=self.family.dtype) for name, value in cond.items()}
        if "time_ids" in cond:
            cond["time_ids"] = torch.full((2 * n, 6), float(self.resolution), device=device)
        x_0, preference = torch.randn(x_t.shape, device=device), torch.ones(n, device=device)
        return Forward(self.family).noised(x_0, cond, Judgement(preference), Draws(0, "train", positions))


def measure(settings: Train, family, network, parameters, resolution: int, accelerator) -> tuple[list[float], int]:
    """Seconds of each update, and the most memory in bytes; torch.OutOfMemoryError if it does not fit."""
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    else:
        network.disable_gradient_checkpointing()
    optimizer = make_optimizer(settings, parameters)
    schedule = make_schedule(settings, optimizer)
    optimizer = accelerator.prepare_optimizer(optimizer)
    choice = ObjectiveSettings(name="diffusion_dpo")
    policy = Policy(family, network, accelerator.autocast)
    objective = Objective(choice, reference.make(choice.reference, policy), lambda t: torch.ones_like(t).float())
    feed = Synthetic(family, network, resolution, accelerator.device)
    update = Updater(settings, policy, objective, feed, accelerator)
    cuda, seconds = accelerator.device.type == "cuda", []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5")  # VmHWM begins again from what is resident now
    for step in range(settings.steps):
        started = time.perf_counter()
        update(step, parameters, optimizer, schedule)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated() if cuda else resident()


def resident() -> int:
    """Bytes that the process had resident at most; 0 where the system does not say it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def row(settings: Train, warmup: int, *rest) -> str:
    """Of the table."""
    start = (settings.batch_size, "on" if settings.gradient_checkpointing else "off")
    try:
        seconds, peak = measure(settings, *rest)
    except (torch.OutOfMemoryError, DiffpoError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return tables.row([*start, "out of memory", "", ""])
    rates = [settings.batch_size / each for each in seconds[warmup:]]
    low, *_, high = quantiles(rates, n=10, method="inclusive")
    memory = f"{peak / 2**30:.1f} GiB" if peak else ""
    return tables.row([*start, f"{median(rates):.3g}", f"{low:.3g} to {high:.3g}", memory])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=[*MODELS, "tiny"], default="sdxl")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="pairs in an update")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--precision", choices=["bf16", "fp16", "no"], default="bf16")
    parser.add_argument("--checkpointing", choices=["on", "off"], nargs="+", default=["on", "off"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--optimizer", default="torch.optim.AdamW")
    parser.add_argument("--warmup", type=int, default=2, help="first updates, which are not measured")
    parser.add_argument("--updates", type=int, default=10, help="measured updates; two or more")
    parser.add_argument("--device", choices=["cpu"], help="by default the GPU, which all but tiny need")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    asked = parser.parse_args(arguments)
    common = {"steps": asked.warmup + asked.updates, "lr": 1e-6, "precision": asked.precision}
    if asked.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = make_accelerator(Train(batch_size=1, **common))
    cuda = accelerator.device.type == "cuda"
    if not cuda and asked.model != "tiny" and asked.device is None:
        sys.exit(
            f"--model {asked.model} needs a GPU; --model tiny runs anywhere, and --device cpu runs it here, slowly"
        )
    with tempfile.TemporaryDirectory() as folder:
        family = make_family(asked.model, asked.precision, asked.resolution, Path(folder))
    network = make_network(family, accelerator.device)
    total = sum(parameter.numel() for parameter in network.parameters())
    parameters = lora.add_lora(network, Lora(rank=asked.rank), family.lora_targets)
    accelerator.prepare_model(network)  # in place
    lines = [
        f"{asked.model}, {total:,} parameters in {asked.precision}, LoRA of rank {asked.rank}, {asked.resolution} px; "
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}; torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}. Median and the middle 80 % of {asked.updates} updates:",
        "",
        f"`python scripts/bench_hardware.py {shlex.join(arguments)}`",
        "",
        tables.head(["pairs in an update", "gradient checkpointing", "pairs/s", "80 %", "peak memory"]),
    ]
    print("\n".join(lines))
    for switch in asked.checkpointing:
        for size in asked.batch_sizes:
            common |= {"batch_size": size, "gradient_checkpointing": switch == "on", "optimizer": asked.optimizer}
            lines.append(row(Train(**common), asked.warmup, family, network, parameters, asked.resolution, accelerator))
            print(lines[-1], flush=True)
            if asked.out:
                asked.out.write_text("\n".join(lines) + "\n")
            for parameter in parameters:  # gradients of an update that did not fit
                parameter.grad = None
            accelerator.free_memory()


if __name__ == "__main__":
    main(sys.argv[1:])
