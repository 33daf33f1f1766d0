"""Data sets as the commands load them, and where those of development lie."""

import os
from pathlib import Path

import pytest
import torch

from helpers.commands import ROOT
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import ImageData, load_images

TEST_DATA = Path(os.environ.get("SSSD_TEST_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(not TEST_DATA.is_dir(), reason=f"no development data at {TEST_DATA}")


def load(data, **options) -> ImageData:
    loader = {key: options.pop(key) for key in ("default_size", "require_labels", "verify") if key in options}
    return load_images(DataConfig(data=str(data), **options), progress=False, **loader)


def everything(data: ImageData, batch: int = 4, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    index, images = zip(*data.batches(torch.arange(len(data)).split(batch), workers=workers), strict=True)
    return torch.cat(index), torch.cat(images)
