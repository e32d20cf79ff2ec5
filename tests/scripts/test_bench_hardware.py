"""The hardware benchmark: the networks it builds are the released ones, and its table tells what was measured."""

import bench_hardware
import pytest
import torch
from published_networks import make_family, make_network

from diffpo.commands.disk import caption_bytes, image_bytes
from diffpo.config import Lora
from diffpo.weights import lora


@pytest.mark.parametrize(
    ("name", "total", "adapted", "caption"),
    [
        # the published models' parameters; a rank-8 LoRA of 560 and of 191 layers; 77 x 2048, 1280 and six sizes
        ("sdxl", 2_567_463_684, 11_612_160, 2 * (77 * 2048 + 1280 + 6)),
        # 16 blocks of 320 to 1280 channels, each with 8 layers
        ("sd15", 859_520_964, 8 * (14 * (5 * 320 + 5 * 640 + 6 * 1280) + 16 * 2 * 768), 2 * 77 * 768),
        # 333 x 4096 and 2048
        ("sd3", 2_028_328_000, 8 * 2 * 1536 * (24 * 8 - 1), 2 * (333 * 4096 + 2048)),
    ],
)
def test_the_networks_are_the_released_ones(tmp_path, name, total, adapted, caption):
    family = make_family(name, "bf16", 1024, tmp_path)
    network = make_network(family, torch.device("meta"))
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in lora.add_lora(network, Lora(), family.lora_targets)) == adapted
    side, channels = 1024 // 8, {"sd3": 16}.get(name, 4)
    assert family.meta_inputs(network, 2, 1024)[0].shape == (2, channels, side, side)
    # what a cache takes for them, at their real size
    assert caption_bytes(family, network) == caption
    assert image_bytes(family, network, (1344, 768)) == 2 * 4 * channels * 168 * 96


def test_a_table_of_batch_sizes(monkeypatch, capsys, tmp_path, fresh_accelerate):
    """On the embedded model. The second batch does not fit, and the third is measured all the same."""
    call, made = bench_hardware.Updater.__call__, []

    def update(self, step, parameters, *rest):
        made.append((self.per_update, self.settings.gradient_checkpointing))
        if self.per_update == 2:
            raise torch.OutOfMemoryError("no room")
        metrics = call(self, step, parameters, *rest)
        if len(made) == 1:  # nothing is trained yet
            assert metrics["loss"] == pytest.approx(0.6931, abs=1e-4) and metrics["grad_norm"] > 0
        return metrics

    monkeypatch.setattr(bench_hardware.Updater, "__call__", update)
    arguments = (
        "--model tiny --device cpu --resolution 16 --precision no --batch-sizes 1 2 3 --updates 2 --warmup 1".split()
    )
    bench_hardware.main([*arguments, "--checkpointing", "off", "on", "--out", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text()
    assert table == capsys.readouterr().out
    assert f"`python scripts/bench_hardware.py {' '.join(arguments)}" in table and torch.__version__ in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[6:]]
    assert [row[:2] for row in rows] == [[str(size), switch] for switch in ("off", "on") for size in (1, 2, 3)]
    for size, _, rate, interval, memory in rows:
        if size == "2":
            assert (rate, interval, memory) == ("out of memory", "", "")
        else:
            low, high = map(float, interval.split(" to "))
            assert 0 < low <= float(rate) <= high
            # on a CPU that of the process: more than torch and its libraries, less than the machine
            assert 0.3 < float(memory.removesuffix(" GiB")) < 64
    runs = [(1, False)] * 3 + [(2, False)] + [(3, False)] * 3
    assert made == runs + [(size, True) for size, _ in runs]


def test_large_models_ask_for_a_gpu(fresh_accelerate, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--model sd3 needs a GPU; --model tiny runs anywhere"):
        bench_hardware.main(["--model", "sd3", "--precision", "no"])
