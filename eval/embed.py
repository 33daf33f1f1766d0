"""Writes the features of images into a file: `accelerate launch eval/embed.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("embed", prog="eval/embed.py")
