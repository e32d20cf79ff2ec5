"""Make everything under assets/ from nothing: tiny SDXL, preference pairs, tiny CLIP, tiny DiT. Seeded; one core.

    python scripts/build_tiny_models.py all --work build/tiny           # every stage in order
    python scripts/build_tiny_models.py vae --work build/tiny           # or one stage at a time

Stages: data (render captioned scenes), vae (autoencoder), unet (UNet and both text encoders), decoder (finish the
decoder on the frozen latents; may run beside unet), assemble (write assets/tiny-sdxl), pairs (write
assets/shapes-preferences), clip (write assets/tiny-clip), dit (DiT and T5 on the autoencoder of assets/tiny-sdxl),
assemble-dit (write assets/tiny-dit). Every stage reads the files of the ones before it in --work,
so a stage can be repeated alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny_models.clip import train_clip
from tiny_models.common import data
from tiny_models.dit import assemble_dit, train_dit
from tiny_models.pairs import pairs
from tiny_models.pipeline import assemble
from tiny_models.unet import train_unet
from tiny_models.vae import train_decoder, train_vae

ASSETS = Path(__file__).resolve().parents[1] / "assets"
STAGES = {
    "data": lambda work, assets: data(work),
    "vae": lambda work, assets: train_vae(work),
    "unet": lambda work, assets: train_unet(work),
    "decoder": lambda work, assets: train_decoder(work),
    "assemble": assemble,
    "pairs": pairs,
    "clip": train_clip,
    "dit": train_dit,
    "assemble-dit": assemble_dit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate files and logs")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder for the finished models and pairs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else [args.stage]:
        STAGES[name](args.work, args.assets)


if __name__ == "__main__":
    main()
