"""Trains and measures a linear probe on every exit of a frozen network: `accelerate launch eval/linear.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("linear", prog="eval/linear.py")
