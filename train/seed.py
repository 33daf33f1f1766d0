"""Trains a small network on the similarities of a frozen teacher (SEED): `accelerate launch train/seed.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("seed", prog="train/seed.py")
