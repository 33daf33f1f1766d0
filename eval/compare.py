"""Trains, measures and reports several methods side by side: `accelerate launch eval/compare.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("compare", prog="eval/compare.py")
