"""Calibrates early exit to a budget and measures what it saves: `python eval/early_exit.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("early-exit", prog="eval/early_exit.py")
