"""`diffpo check`: the dry run. The config and the data are read without torch; the model's shapes come last."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

from .config import Config
from .data.pairs import Pairs, scan
from .errors import DiffpoError

LIMIT = 5000  # rows that are decoded; of a larger source, this many evenly spaced ones
CHECKPOINTED = ("ResnetBlock2D", "BasicTransformerBlock")  # what diffusers recomputes in the backward pass


def check(config: Config) -> None:
    """Print what the config resolves to, what the data holds and what training would need.

    Raises DiffpoError, after everything is printed, if training could not start.
    """
    from rich.console import Console

    say = Console(highlight=False, soft_wrap=True, markup=False).print
    say(config.to_yaml())
    problems: list[str] = []
    data = config.data
    pairs = scan(data, data.train, data.train_split, LIMIT, quiet=False)
    describe(pairs, config, say, problems)
    if data.validation:
        describe(scan(data, data.validation, data.validation_split, LIMIT, quiet=False), config, say, problems)

    train = config.train
    update = train.batch_size * train.accumulation
    say(
        f"training  {train.steps} steps of {update} pairs "
        f"({train.batch_size} at a time x {train.accumulation} accumulated)"
    )
    if len(pairs):
        usable = len(pairs) * pairs.total / pairs.rows
        say(f"          each pair is seen {train.steps * update / usable:.3g} times; N processes multiply both by N")
    say(f"caches    {data.cache}: {_caches(pairs, config)}")
    model(config, say)
    problems += environment(config)
    if problems:
        raise DiffpoError("training would not start: " + "; ".join(problems))
    say("training can start: diffpo train")


def describe(pairs: Pairs, config: Config, say: Any, problems: list[str]) -> None:
    """Counts, faults and image sizes of one source."""
    data = config.data
    part = f" ({pairs.rows} of {pairs.total} rows looked at, evenly spaced)" if pairs.rows < pairs.total else ""
    say(f"{pairs.source}{part}")
    names = ", ".join(f"{role}={name}" for role, name in pairs.columns.model_dump().items() if name)
    captions = len({pair.caption for pair in pairs.pairs})
    say(f"  columns     {names}")
    say(f"  pairs       {len(pairs)} with {captions} captions")
    say(f"  ties        {pairs.ties} {'left out' if data.ties == 'drop' else 'kept as soft labels'}")
    say(f"  unusable    {pairs.describe_bad() if pairs.bad else 'none'}")
    sizes = Counter(pair.size for pair in pairs.pairs)
    for (width, height), count in sizes.most_common(8):
        small = "  enlarged" if min(width, height) < data.resolution else ""
        say(f"  {width:>5}x{height:<5} {count:>7}{small}")
    if len(sizes) > 8:
        say(f"  {len(sizes) - 8} other sizes, {sum(sizes.values()) - sum(n for _, n in sizes.most_common(8))} pairs")
    if pairs.bad and data.bad_rows == "error":
        problems.append(f"{pairs.source}: {pairs.describe_bad()}; mend them or set data.bad_rows=skip")
    elif all(pair.preference == 0.5 for pair in pairs.pairs):
        problems.append(f"{pairs.source} has {'only ties' if pairs.ties else 'no usable pair'}")


def _caches(pairs: Pairs, config: Config) -> str:
    captions = f"text embeddings of {len({pair.caption for pair in pairs.pairs})} captions and of none"
    if config.data.crop == "random" or config.data.flip:
        return f"{captions}; no latents, because a random crop or flip shows another picture at each step"
    if not config.data.cache_latents:
        return f"{captions}; no latents (data.cache_latents=false)"
    return f"{captions}; latents of {2 * len(pairs)} images at {config.data.resolution} px"


def model(config: Config, say: Any) -> None:
    """Parameters, and a rough estimate of memory, from the shapes alone (meta device)."""
    from . import models
    from .lora import add_lora

    family = models.load(config.model, config.train.precision)
    unet = family.meta_unet()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    total = sum(parameter.numel() for parameter in unet.parameters())
    trained = sum(parameter.numel() for parameter in add_lora(unet, config.lora, family.lora_targets))
    kept = activations(family, unet, 2 * config.train.batch_size, config.data.resolution, config.train)
    optimizer = trained * (2 if "8bit" in config.train.optimizer else 8)
    say(f"model     {type(family).__name__}, {family.prediction}; {total:,} parameters in {str(family.dtype)[6:]}")
    say(f"          {trained:,} trainable (LoRA rank {config.lora.rank}, float32)")
    parts = {"weights": weights, "LoRA, gradients, optimiser": 8 * trained + optimizer, "activations": kept}
    amounts = ", ".join(f"{name} {_amount(size)}" for name, size in parts.items())
    say(f"memory    roughly {_amount(sum(parts.values()))} while training ({amounts}); encoders are freed before")


def environment(config: Config) -> list[str]:
    """What else would stop the run: its folder, its optimiser, the machine."""
    import torch

    from . import checkpoint
    from .train import make_optimizer

    problems = []
    for test in (
        lambda: checkpoint.check_folder(config),
        lambda: make_optimizer(config.train, [torch.nn.Parameter(torch.zeros(2, 2))]),
    ):
        try:
            test()
        except DiffpoError as error:
            problems.append(str(error))
    if config.train.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("train.precision=fp16 needs a GPU, and there is none here; use bf16 or no")
    if config.log.tensorboard and not importlib.util.find_spec("tensorboard"):
        problems.append('log.tensorboard needs tensorboard: pip install "diffpo[trackers]"')
    return problems


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def activations(family: Any, unet: Any, samples: int, resolution: int, train: Any) -> int:
    """Bytes that a backward pass needs, counted as the outputs of all layers; under gradient checkpointing, the
    outputs of the checkpointed blocks and the inside of the largest one. An estimate: kernels save less, and their
    work space is extra."""
    import torch

    blocks = {name: [0, 0] for name, module in unet.named_modules() if type(module).__name__ in CHECKPOINTED}
    outside = 0

    def note(name: str, leaf: bool) -> Any:
        block = next((block for block in blocks if name.startswith(block + ".")), None)

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal outside
            size = output.numel() * output.element_size() if isinstance(output, torch.Tensor) else 0
            if not leaf:
                blocks[name][1] += size
            elif block:
                blocks[block][0] += size
            else:
                outside += size

        return hook

    hooks = []
    for name, module in unet.named_modules():
        leaf = not any(True for _ in module.children())
        if leaf or name in blocks:
            hooks.append(module.register_forward_hook(note(name, leaf)))
    with torch.no_grad():
        family.predict(unet, *family.meta_inputs(unet, samples, resolution))
    for hook in hooks:
        hook.remove()
    inside, outputs = [size for size, _ in blocks.values()], [size for _, size in blocks.values()]
    if train.gradient_checkpointing:
        return outside + sum(outputs) + max(inside, default=0)
    return outside + sum(inside)
