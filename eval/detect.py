"""Measures a trained detector by average precision: `python eval/detect.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("detect-eval", prog="eval/detect.py")
