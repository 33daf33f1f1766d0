"""Measures every exit of a frozen network by nearest neighbours: `accelerate launch eval/knn.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("knn", prog="eval/knn.py")
