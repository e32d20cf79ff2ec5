"""Modules whose import is put off: nothing of them is imported until it is used, and then all is as without it."""

import json
import subprocess
import sys
import textwrap

import pytest

from diffpo.common import postponed


def fresh(code: str) -> dict:
    """What a new process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `slowly`, with a part, that counts how often each is executed."""
    (tmp_path / "slowly").mkdir()
    (tmp_path / "slowly" / "__init__.py").write_text(
        "import builtins\nbuiltins.executed.append('slowly')\nfrom .part import seven\nVALUE = 5\n"
    )
    (tmp_path / "slowly" / "part.py").write_text(
        "import builtins\nbuiltins.executed.append('part')\ndef seven():\n    return 7\n"
    )
    executed: list[str] = []
    monkeypatch.setattr("builtins.executed", executed, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    postponed.postpone(["slowly"])
    yield executed
    sys.meta_path[:] = before
    for name in [name for name in sys.modules if name.partition(".")[0] == "slowly"]:
        del sys.modules[name]


def test_an_attribute_imports_the_module_once(package):
    import slowly

    held = slowly
    assert package == [] and slowly.__spec__.origin.endswith("__init__.py")
    with pytest.raises(AttributeError):
        slowly.__warningregistry__  # noqa: B018 (which tests look for in every module)
    assert package == []
    assert slowly.VALUE == 5 and package == ["slowly", "part"]
    import slowly.part

    # those that hold the stand-in and those that import it anew see one module
    assert held.seven is slowly.seven is slowly.part.seven is sys.modules["slowly"].seven
    assert held.seven() == 7 and package == ["slowly", "part"]


def test_a_part_is_executed_once(package):
    import slowly  # noqa: F401

    assert package == []
    from slowly.part import seven

    assert seven() == 7 and package == ["slowly", "part"]
    assert sys.modules["slowly"].seven is seven


def test_a_postponed_module_can_be_absent_until_it_is_used(package):
    import importlib.util

    import slowly

    with postponed.absent("slowly"):
        assert importlib.util.find_spec("slowly") is None
        with pytest.raises(ImportError):
            import slowly.part
    assert importlib.util.find_spec("slowly") is not None and package == []
    assert slowly.VALUE == 5
    with postponed.absent("slowly"):  # it is in use
        import slowly as again

        assert again.VALUE == 5


def test_training_needs_no_compiler_and_the_compiler_still_works():
    """One process: a LoRA is added by peft and an optimiser steps without torch._dynamo, bitsandbytes or scipy.stats.
    Then a function is compiled (by the eager backend), which breaks its graph where it was told to before."""
    found = fresh(
        """
        import json, sys
        from diffpo.common.postponed import Postponed, postpone
        postpone()
        import torch
        from diffusers import UNet2DModel
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from diffpo.weights.lora import inject
        from peft import LoraConfig

        held = torch.compiler.disable(lambda x: x + 1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 3))
        inject(net, LoraConfig(r=2, target_modules=["0"]), "default")
        parameters = [p for p in net.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=0.1)
        net(torch.ones(1, 3)).sum().backward()
        optimiser.step()
        names = ("torch._dynamo", "bitsandbytes", "scipy.stats")
        late = [name for name in names if name not in sys.modules or isinstance(sys.modules[name], Postponed)]
        graphs = []
        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward
        compiled = torch.compile(lambda x: held(x * 2) * 3, backend=backend)
        value = compiled(torch.ones(2)).tolist()
        import scipy.stats
        print(json.dumps({
            "late": late, "value": value, "graphs": len(graphs), "trained": len(parameters),
            "real": not isinstance(sys.modules["torch._dynamo"], Postponed), "normal": scipy.stats.norm.cdf(0.0),
        }))
        """
    )
    assert found["late"] == ["torch._dynamo", "bitsandbytes", "scipy.stats"]
    assert found["trained"] == 2 and found["value"] == [9.0, 9.0]
    assert found["graphs"] == 2 and found["real"]  # before and behind the function that is not compiled
    assert found["normal"] == 0.5
