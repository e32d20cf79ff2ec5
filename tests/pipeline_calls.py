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
