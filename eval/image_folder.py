"""Writes images as PNG files of one folder, 00000.png and so on, for tools that read nothing else.

python eval/image_folder.py --data cifar10 --split 'train[:20000]' --out FOLDER
"""

import argparse
from pathlib import Path

import torch
from torchvision.io import write_png

from sssd_zoo.cli.guard import guarded
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError


def main() -> None:
    """Writes them, as they are stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for `sssd`")
    parser.add_argument("--split", help="as for `sssd`")
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: give a folder to create")
    data = load_images(DataConfig(data=args.data, split=args.split, unlabelled=True))
    args.out.mkdir(parents=True)
    for positions, images in data.batches(torch.arange(len(data)).split(1000)):
        for position, image in zip(positions.tolist(), images, strict=True):
            write_png(image.cpu(), str(args.out / f"{position:05d}.png"), compression_level=1)
    print(f"{len(data):,} images: {args.out}")


if __name__ == "__main__":
    with guarded():
        main()
