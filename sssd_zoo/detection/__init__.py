"""Faster R-CNN on a trained trunk, and its average precision."""

from sssd_zoo.detection.detector import load_detector

__all__ = ["load_detector"]
