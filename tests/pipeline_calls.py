"""What networks are called with, by diffusers' pipelines and by us."""

import copy
import inspect

import torch


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
def recorded(pipe, **options):
    """Sampling by the pipeline itself, with three steps: its pictures, calls of the network, times, and the latents
    after the last step."""
    scheduler, own_step, after = pipe.scheduler, pipe.scheduler.step, []

    def recording(*given, **more):
        after.append(own_step(*given, **more)[0].clone())
        return (after[-1],)

    scheduler.step = recording
    pictures, calls = calls_of(
        pipe.transformer, lambda: pipe(**options, num_inference_steps=3, output_type="pt").images
    )
    del scheduler.step
    return pictures, calls, scheduler.timesteps.tolist(), after[-1]


@torch.no_grad()
def sampled(policy, scheduler, times, noise, given):
    """The same by our calls of the network, at the pipeline's times: latents, and the calls."""
    if hasattr(scheduler, "model_outputs"):
        scheduler.set_timesteps(3)
    scheduler._step_index = None
    state, calls = noise, []
    for t in times:
        now = torch.full((len(noise),), float(t))
        out, more = calls_of(policy.network, lambda x=state, now=now: policy.output(x, now, given))
        calls += more
        state = scheduler.step(out, torch.as_tensor(t), state).prev_sample
    return state, calls
