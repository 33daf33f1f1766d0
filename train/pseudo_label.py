"""Clusters a pretrained network's features into pseudo labels: `accelerate launch train/pseudo_label.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("pseudo-label", prog="train/pseudo_label.py")
