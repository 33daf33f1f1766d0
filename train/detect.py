"""Fine-tunes Faster R-CNN on a trained trunk: `accelerate launch train/detect.py --help`."""

from sssd_zoo.cli import run

if __name__ == "__main__":
    run("detect", prog="train/detect.py")
