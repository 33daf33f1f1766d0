"""WebDataset: tar files with images, and classes in `cls` or `json`."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import file_bytes, picture
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import load_images, split_names
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError


def write_shard(path, samples):
    """A tar file of samples, each a mapping of endings to contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{path.stem}-{number:04}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def load(data, **settings):
    return load_images(DataConfig(data=str(data), **settings), progress=False)


def images(seeds):
    return np.stack([np.asarray(picture(seed)) for seed in seeds]).transpose(0, 3, 1, 2)


def labelled(seeds):
    return [{"png": file_bytes(picture(seed)), "cls": str(seed % 3).encode()} for seed in seeds]


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards to train on and one to test on."""
    write_shard(tmp_path / "data/train-000.tar", labelled(range(6)))
    write_shard(tmp_path / "data/train-001.tar", labelled(range(6, 12)))
    write_shard(tmp_path / "data/test-000.tar", labelled(range(12, 15)))
    return tmp_path / "data"


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_shards(shards, in_memory):
    data = load(shards, in_memory=in_memory, workers=0)
    assert np.array_equal(data.gather(torch.arange(12)).numpy(), images(range(12)))
    assert data.labels.tolist() == [seed % 3 for seed in range(12)]
    assert split_names(DataConfig(data=str(shards))) == ["test", "train"]
    assert len(load(shards, split="test")) == 3


def test_one_shard_is_another_data_set(shards):
    assert len(load(shards / "train-001.tar")) == 6
    assert load(shards / "train-001.tar").fingerprint != load(shards / "train-000.tar").fingerprint


def test_a_class_in_json(tmp_path):
    samples = [
        {"jpg": file_bytes(picture(seed), "JPEG"), "json": json.dumps({"label": name, "w": 12}).encode()}
        for seed, name in enumerate(["owl", "eel", "owl"])
    ]
    data = load(write_shard(tmp_path / "a.tar", samples))
    assert data.class_names == ["eel", "owl"]
    assert data.labels.tolist() == [1, 0, 1]


def test_images_alone_and_16_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (3, 12, 12)).astype(np.uint16)
    samples = [{"png": file_bytes(Image.fromarray(each))} for each in values]
    data = load(write_shard(tmp_path / "a.tar", samples), channels=1)
    assert np.array_equal(data.gather(torch.arange(3)).numpy()[:, 0], values)
    assert data.labels is None


def test_a_stream(shards):
    data = load_streaming(DataConfig(data=str(shards), streaming=True), progress=False)
    _, found = next(data.batches(12, seed=0, epoch=0))
    assert {each.tobytes() for each in found.numpy()} == {each.tobytes() for each in images(range(12)).copy()}


def test_images_beside_shards_come_first(shards, caplog):
    picture(0).save(shards / "loose.png")
    assert len(load(shards, split="train")) == 1
    assert "3 .tar files (unpack them, or give the folder of those alone)" in caplog.text


def test_a_corrupt_image_is_named_by_its_row(tmp_path):
    samples = [{"png": file_bytes(picture(0))}, {"png": b"junk"}, {"png": file_bytes(picture(1))}]
    with pytest.raises(UserError, match="row 1: it is not an image"):
        load(write_shard(tmp_path / "a.tar", samples))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, None])
def test_what_is_no_shard(tmp_path, shards, content):
    data = (shards / "train-000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2 + 100] if content is None else content)
    with pytest.raises(UserError, match=r"a\.tar"):
        load(tmp_path / "a.tar")
