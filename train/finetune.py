"""Fine-tunes networks on a few labels: `accelerate launch train/finetune.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("finetune", prog="train/finetune.py")
