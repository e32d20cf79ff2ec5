"""Full fine-tuning (`lora: null`): the network itself is trained, and compared with frozen copies of what it was.

The trained weights are float32, and autocast computes in train.precision. A copy is no part of the network: DDP, the
optimiser, `state_dict` and the files do not see it. What is written is a folder in diffusers' own format, named like
the part of the pipeline:

OUTPUT/unet/config.json, *.safetensors   for `UNet2DConditionModel.from_pretrained(OUTPUT, subfolder="unet")`
OUTPUT/unet/diffpo.json                  what a LoRA keeps in its header: objective, base, data, step
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.files import whole_folder
from ..common.text import read_text
from ..config import Config, ObjectiveSettings
from ..models.identity import base_identity, same_base
from .header import known
from .lora import ADAPTER, BEHAVIOUR, REFERENCE, network_of

if TYPE_CHECKING:
    import torch

    from ..models import Family

ABOUT = "diffpo.json"
BASE = "base"  # the copy that stays; a reference that moves has one of its own


class Copies:
    """Frozen copies of a network by their names. Torch does not look for modules in here."""

    def __init__(self, network: torch.nn.Module, names: list[str], precision: torch.dtype) -> None:
        import torch

        self.precision = precision
        self.modules = {name: _copy(network, precision if name == BASE else torch.float32) for name in names}

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[torch.nn.Module]:
        """The copy ``name``, computing as the network does in training, without gradients."""
        import torch

        module = self.modules[name]
        half = self.precision != torch.float32
        device = next(module.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, self.precision if half else None, enabled=half):
            yield module


def _copy(network: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Frozen. Only what autocast would cast is kept in ``dtype``, and the rest in float32 as it is trained: before the
    first update both compute the same to the last bit."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from torch.nn.modules.conv import _ConvNd

    made = copy.deepcopy(network).requires_grad_(False)
    for module in made.modules():
        if isinstance(module, (torch.nn.Linear, _ConvNd)):
            module.to(dtype)
    made.forward = convert_outputs_to_fp32(made.forward)  # as accelerate does with the network
    return made


def _contiguous(_module: torch.nn.Module, args: tuple) -> tuple:
    """Torch multiplies inputs that are not contiguous by another kernel where weights need no gradient, and that kernel
    rounds otherwise."""
    return args[0].contiguous(), *args[1:]


def needed(objective: ObjectiveSettings) -> list[str]:
    """The names of the frozen copies that an objective needs."""
    policy = objective.reference.policy
    samples = objective.source == "self_play" or objective.rollout.sampler == "reference"
    # a step scorer may read the base's features
    base = objective.weighting == "measured" or objective.source == "pool" or (policy == "none" and samples)
    names = [BASE] if base or policy == "adapter_off" else []
    names += [] if policy in ("adapter_off", "none") else [REFERENCE]
    return names + ([BEHAVIOUR] if objective.behaviour_moves else [])


class WholeNetwork:
    """All weights of ``network``; see `trained.Weights`."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    @staticmethod
    def owns(network: torch.nn.Module) -> bool:
        """Is the network itself trained, not a LoRA on it?"""
        return hasattr(network, "frozen_copies")

    @classmethod
    def load(cls, config: Config, family: Family, device: Any) -> WholeNetwork:
        import torch

        exact = copy.copy(family)
        exact.dtype = torch.float32
        network = exact.load_network(device)
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(_contiguous)
        network.frozen_copies = Copies(network, needed(config.objective), family.dtype)
        return cls(network.requires_grad_(True))

    def begin(self, config: Config, family: Family) -> list[torch.nn.Parameter]:
        return list(self.network.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        self.network.load_state_dict(state)

    # ---- the base and further copies

    def frozen(self) -> list[torch.nn.Module]:
        return list(self.network.frozen_copies.modules.values())

    def switched(self, adapter: str | None) -> contextlib.AbstractContextManager[torch.nn.Module]:
        return self.network.frozen_copies.on(adapter or BASE)

    def add_copy(self, name: str) -> None:
        """It is there from the beginning."""

    def parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        module = self.network if adapter == ADAPTER else self.network.frozen_copies.modules[adapter]
        return dict(module.named_parameters())

    # ---- files

    def gather(self) -> None:
        """Nothing: it is never sharded."""

    def path_in(self, folder: Path, component: str) -> Path:
        return folder / component

    def save(self, folder: Path, gathered: Any, component: str, about: dict[str, Any]) -> None:
        _save(folder, self.network, component, about)

    def restore(self, folder: Path, component: str) -> None:
        read_into(self.network, folder / component)

    @staticmethod
    def find(path: str | Path) -> Path | None:
        """The folder of trained weights that ``path`` means: itself, or one in the folder of a run or checkpoint."""
        path = Path(path).expanduser()
        found = (folder for folder in (path, path / "unet", path / "transformer") if (folder / ABOUT).is_file())
        return next(found, None)

    @staticmethod
    def file_hash(file: Path) -> str:
        return weights_hash(file)

    @staticmethod
    def knows_users(file: Path) -> bool:
        return False

    @staticmethod
    def check(pipe: Any, file: Path) -> None:
        check(pipe, file)

    @staticmethod
    def load_into(pipe: Any, file: Path, strength: float = 1.0) -> None:
        if strength != 1:
            raise DiffpoError(f"{file} is a whole network, not a LoRA: it has no strength, here {strength:g}")
        check(pipe, file)
        read_into(network_of(pipe), file)


# ---- files


def _save(folder: Path, network: torch.nn.Module, component: str, about: dict[str, Any]) -> None:
    """Write the network as ``folder``/``component``: all of it or nothing."""
    with whole_folder(folder / component, replace=True) as part:
        network.save_pretrained(part)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # the path on this disk is private
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (part / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """What is `known` of how the weights in ``folder`` were trained."""
    try:
        about = known(json.loads(read_text(folder / ABOUT)))
        about["base"]["hash"]
        return about
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DiffpoError(f"cannot read {folder / ABOUT}: {error!r}; take another checkpoint of the run") from error


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files."""
    total = sha256()
    for path in _files(folder):
        with open(path, "rb") as file:
            total.update(path.name.encode() + file_digest(file, "sha256").digest())
    return total.hexdigest()


def check(pipe: Any, folder: Path) -> None:
    """DiffpoError unless the weights in ``folder`` were trained from this base, and are all there."""
    network, base = network_of(pipe), read_about(folder)["base"]
    if not same_base(base, base_identity(network)):
        raise DiffpoError(
            f"the weights in {folder} were trained from another base model: {base.get('name', 'unknown')}. Load that "
            f"model, or train on this one"
        )
    _check_names(network, folder)


def read_into(network: torch.nn.Module, folder: Path) -> None:
    """Give ``network`` the weights in ``folder``, in its own precision; DiffpoError if they do not fit or are not
    finite."""
    _check_names(network, folder)
    weights = network.state_dict()
    for path in _files(folder):
        for name, value in _read(path):
            if not weights[name].copy_(value).isfinite().all():
                kind = str(network.dtype)[6:]
                raise DiffpoError(f"{path}: {name} is not finite in {kind}; use bfloat16, or an earlier checkpoint")


def _check_names(network: torch.nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    here = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    there: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, "pt") as file:
                there |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    if wrong := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        raise DiffpoError(
            f"the weights in {folder} do not fit the model: {len(wrong)} differ in name or shape, e.g. {wrong[0]}. "
            f"Load the model that they were trained from"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DiffpoError:
    return DiffpoError(
        f"cannot read the weights {path}: {error} (truncated, or not a safetensors file); use another checkpoint"
    )
