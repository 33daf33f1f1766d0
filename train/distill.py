"""Trains a four-exit network that teaches itself on pseudo labels: `accelerate launch train/distill.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("distill", prog="train/distill.py")
