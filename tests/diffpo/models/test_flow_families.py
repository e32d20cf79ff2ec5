"""The families whose text encoders are language models, against diffusers' own pipelines."""

import copy
import inspect

import pytest
import tiny_flows as tiny
import torch

from diffpo import models
from diffpo.config import Model
from diffpo.evaluation import generate
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning

MAKE = {
    "z_image": tiny.make_z_image,
    "qwen_image": tiny.make_qwen_image,
    "flux2_klein": tiny.make_flux2_klein,
    "sana": tiny.make_sana,
    "lumina2": tiny.make_lumina2,
    "chroma": tiny.make_chroma,
    "hidream": tiny.make_hidream,
}
CAPTIONS = ("a cat", "a long red dog, on a chair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): the tiny pipeline of a family, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp("flows") / name)
        return made[name]

    return get


def side_of(name):
    return 32 if name == "sana" else 16  # Sana's pipeline takes multiples of 32 px


def family_of(path, side, **options):
    return models.load(Model(path=str(path), **options), resolution=side)


def values(found):
    """All tensors in ``found``, one after the other."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [value for each in found for value in values(each)] if isinstance(found, (list, tuple)) else [found]


def calls_of(network, compute):
    """``compute()``, and what each call of the network was given in it, by the names of its parameters."""
    seen, names = [], list(inspect.signature(type(network).forward).parameters)[1:]

    def hook(_, inputs, options):
        given = dict(zip(names, inputs, strict=False)) | options
        seen.append({key: copy.deepcopy(value) for key, value in given.items() if "kwargs" not in key})

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    found = compute()
    handle.remove()
    return found, seen


def compare(ours, theirs):
    """Calls as of `calls_of`."""
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        our, their = ({k: v for k, v in each.items() if v is not None and k != "return_dict"} for each in (our, their))
        assert our.keys() == their.keys()
        for name in our:
            for one, other in zip(values(our[name]), values(their[name]), strict=True):
                torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", list(MAKE))
def test_our_calls_and_latents_are_those_of_the_pipeline(folder, name, guidance):
    """Its own sampler with three steps: every call of the network is given what we give it, and ours leads to the same
    latents: text, its absence and its mask, time and its direction, sign, packing, guidance."""
    side = side_of(name)
    family = family_of(folder(name), side, guidance=guidance)
    pipe = models.load_pipeline(str(folder(name)), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    network = pipe.transformer
    shape = family.latent_shape(network, side)
    noise = torch.stack([generate.initial_noise(shape, 3, index)[0] for index in range(2)])
    options = type(family).painting(pipe, list(CAPTIONS), None, noise, guidance)
    scheduler, own_step, after = pipe.scheduler, pipe.scheduler.step, []

    def recording(*given, **options):
        after.append(own_step(*given, **options)[0].clone())
        return (after[-1],)

    scheduler.step = recording
    pictures, theirs = calls_of(network, lambda: pipe(**options, num_inference_steps=3, output_type="pt").images)
    del scheduler.step
    times = scheduler.timesteps.tolist()
    if hasattr(scheduler, "model_outputs"):
        scheduler.set_timesteps(3)
    scheduler._step_index = None
    family.load_encoders()
    prompted, empty = (family.encode_text(list(texts)) for texts in (CAPTIONS, (None, None)))
    free = None if guidance == 1 or family.guidance_is_input else empty
    policy, given, state = Policy(family, network), Conditioning(prompted, free, guidance), noise
    ours = []
    for t in times:
        out, calls = calls_of(network, lambda x=state, t=t: policy.output(x, torch.full((2,), float(t)), given))
        ours += calls
        state = scheduler.step(out, torch.as_tensor(t), state).prev_sample
    if free is None:
        compare(ours, theirs)
    found = type(family).unpacked(after[-1], *noise.shape[-2:])
    torch.testing.assert_close(state, found, rtol=1e-5, atol=1e-5)
    assert (found - noise).std() > 0.1
    torch.testing.assert_close((family.decode(state) / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)
