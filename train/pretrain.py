"""Pretrains a network without labels by MoCo v2: `accelerate launch train/pretrain.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("pretrain", prog="train/pretrain.py")
