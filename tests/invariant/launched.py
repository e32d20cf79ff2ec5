"""What the tests start with `accelerate launch`: all commands of diffpo's in one start, as the imports are slow.

    accelerate launch ... tests/invariant/launched.py '{"whole": [["train", "recipe.yaml", ...], ...], "sharded": []}'

A command that fails says so, and the next one follows. FSDP, which accelerate's config sets up, is on for ``sharded``.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from diffpo import cli

TESTS = Path(__file__).parents[1]
# for the scorers of on_policy.py; the root first, since tests/ has folders of the packages' names
sys.path += [str(TESTS.parent), str(TESTS)]

made = AcceleratorState.__init__


def sharding_on_cpu(self, *args, fsdp_plugin=None, **options):
    """accelerate 1.15 takes FSDP for accelerators only, by a list of names; all that follows from it runs on a CPU."""
    made(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def run(commands: list[list[str]], sharded: bool) -> None:
    AcceleratorState._reset_state()
    os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
    for arguments in commands:
        sys.argv = ["diffpo", *arguments]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                print(f"{arguments[-1]} ended with {end.code}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true", "accelerate's config does not ask for FSDP"
    AcceleratorState.__init__ = sharding_on_cpu
    # peft imports it where it can, for layers that no test here has; that takes two seconds a process
    sys.modules["bitsandbytes"] = None
    given = json.loads(sys.argv[1])
    run(given["whole"], sharded=False)
    run(given["sharded"], sharded=True)
