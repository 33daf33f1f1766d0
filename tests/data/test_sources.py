"""Where images come from: folders, parquet, `save_to_disk`, the Hub and its cache, and what none of them is."""

import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers.data import TEST_DATA, load, needs_data
from helpers.disk import files_up_to
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.sources import short_name
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError


class TestSources:
    def test_folder_with_classes(self, classes):
        data = load(classes)
        assert data.class_names == ["cat", "dog", "eel"]
        assert data.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert (data.name, data.split, data.size) == ("classes", "train", 12)
        expected = np.asarray(Image.open(classes / "dog" / "1.png")).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.gather(torch.tensor([3]))[0], expected)

    def test_folder_of_images(self, tmp_path):
        for seed in range(3):
            write(tmp_path / f"{seed}.png", picture(seed))
        (tmp_path / "notes.txt").write_text("not an image")
        write(tmp_path / ".hidden" / "4.png", picture(4))
        data = load(tmp_path)
        assert len(data) == 3
        assert data.labels is None
        assert data.class_names is None

    def test_one_image(self, tmp_path):
        write(tmp_path / "one.png", picture(0))
        assert len(load(tmp_path)) == 1

    def test_parquet_file_and_folder(self, tmp_path):
        pictures = [file_bytes(picture(seed)) for seed in range(5)]
        write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", pictures[:2], label=["b", "a"])
        write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", pictures[2:4], label=["b", "b"])
        write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pictures[4:], label=["c"])
        train, test = load(tmp_path), load(tmp_path, split="test")
        assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 1, 1], [2])
        assert train.class_names == test.class_names == ["a", "b", "c"]
        single = load(tmp_path / "data" / "test-00000-of-00001.parquet", split="test")
        assert single.fingerprint == test.fingerprint
        assert (
            load(write_parquet(tmp_path / "my.parquet", pictures)).fingerprint
            == load(tmp_path / "my.parquet").fingerprint
        )

    @pytest.mark.parametrize("splits", [False, True])
    def test_save_to_disk(self, tmp_path, splits):
        rows = datasets.Dataset.from_dict(
            {"photo": [picture(seed) for seed in range(4)], "target": [3, 5, 3, 5]},
            features=datasets.Features(photo=datasets.Image(), target=datasets.Value("int64")),
        )
        # A selection keeps its order in a table of indices beside the data.
        rows = rows.select([2, 1, 0])
        (datasets.DatasetDict(train=rows) if splits else rows).save_to_disk(tmp_path / "saved")
        data = load(tmp_path / "saved")
        assert (data.labels.tolist(), data.class_names) == ([0, 1, 0], ["3", "5"])
        np.testing.assert_array_equal(data.gather(torch.tensor([0]))[0], np.asarray(picture(2)).transpose(2, 0, 1))

    @pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
    @pytest.mark.parametrize("content", ["{}", "no JSON"])
    def test_images_beside_a_file_of_such_a_name(self, name, content, tmp_path):
        write(tmp_path / "a.png", picture(0))
        (tmp_path / name).write_text(content)
        assert len(load(tmp_path)) == 1

    def test_endings_in_capitals(self, tmp_path):
        image = write(tmp_path / "photos" / "a.png", picture(0))
        (tmp_path / "LIST.TXT").write_text(f"{image}\n")
        write_parquet(tmp_path / "ROWS.PARQUET", [file_bytes(picture(1))])
        assert len(load(tmp_path / "LIST.TXT")) == len(load(tmp_path / "ROWS.PARQUET")) == 1

    def test_raw_bytes_in_plain_parquet(self, tmp_path):
        pictures = [file_bytes(picture(seed)) for seed in range(3)]
        pq.write_table(pa.table({"img": pictures, "kind": [1, 2, 3]}), tmp_path / "plain.parquet")
        pq.write_table(
            pa.table({"image": [{"bytes": data, "path": "x.png"} for data in pictures]}), tmp_path / "struct.parquet"
        )
        one, other = load(tmp_path / "plain.parquet"), load(tmp_path / "struct.parquet")
        assert one.fingerprint == other.fingerprint
        assert one.labels is None
        assert load(tmp_path / "plain.parquet", label_column="kind").labels.tolist() == [0, 1, 2]

    @needs_data
    def test_real_folder(self):
        data = load(TEST_DATA / "tiny_imagenet_32", split="validation", require_labels=True)
        assert (len(data), data.size, len(data.class_names)) == (10_000, 32, 200)
        assert (np.bincount(data.labels) == 50).all()

    @needs_data
    def test_real_photographs(self):
        data = load(TEST_DATA / "bccd" / "JPEGImages", default_size=64)
        assert (len(data), data.size, data.labels) == (364, 64, None)
        assert 100 < data.gather(torch.arange(364)).float().mean() < 220

    def test_nothing_is_printed(self, classes, capfd):
        write_parquet(classes.parent / "p.parquet", [file_bytes(picture(0))])
        capfd.readouterr()
        load(classes)
        load(classes.parent / "p.parquet")
        assert capfd.readouterr() == ("", "")


class TestShortName:
    @pytest.mark.parametrize(
        "path",
        [
            *("/home/alice/photos", "/home/alice/photos/", "local-dir:/home/alice/photos", "~nobody/photos"),
            *("~/none/photos", "./none/photos", "../none/photos", "a/b/photos", "my pictures/photos"),
            *("local-dir:a/photos", "local-dir:photos", "C:/Users/alice/photos", r"C:\Users\alice\photos"),
        ],
    )
    def test_a_path_that_is_not_there_is_shortened(self, path):
        assert short_name(path) == "photos"
        assert short_name([path, "org/name"]) == "photos + name"

    def test_a_path_that_is_there_is_shortened(self, tmp_path, monkeypatch):
        (tmp_path / "a" / "photos").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "a" / "photos")
        for path in (f"{tmp_path}/a/photos", f"local-dir:{tmp_path}/a/photos", ".", "../photos"):
            assert short_name(path) == "photos"

    @pytest.mark.parametrize(
        "name",
        [
            *("cifar10", "cifar10:plain_text", "org/name", "org/name:plain text", "cifar10-sample", "x" * 9999),
            *("resnet18.a1_in1k", "hf-hub:org/name", "hf_hub:org/name@refs/pr/1"),
        ],
    )
    def test_a_name_stays(self, name):
        assert short_name(name) == name


class TestBadInput:
    @pytest.mark.parametrize("name", ["/no/such/folder", "./photos", "no/such/folder", "photos.parquet", "a b", "a--b"])
    def test_no_such_path(self, name):
        with pytest.raises(UserError, match="no file or folder"):
            load(name)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="is empty"):
            load(tmp_path)

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "notes.txt").write_text("text")
        with pytest.raises(UserError, match=r"holds no images: none of its 1 files ends in \.jpg"):
            load(tmp_path)

    def test_file_of_another_kind(self, tmp_path):
        with pytest.raises(UserError, match="another kind"):
            load(write(tmp_path / "one.png", picture(0)))

    @pytest.mark.parametrize("content", [b"", b"this is not parquet"])
    def test_broken_parquet(self, tmp_path, content):
        (tmp_path / "broken.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*broken\.parquet: .*(?i:parquet)"):
            load(tmp_path / "broken.parquet")

    def test_parquet_without_rows(self, tmp_path):
        with pytest.raises(UserError, match="has no rows"):
            load(write_parquet(tmp_path / "none.parquet", []))

    def test_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        pictures = [file_bytes(picture(seed, 64)) for seed in range(20)]
        file = write_parquet(tmp_path / "my.parquet", pictures)
        refusal = pytest.raises(UserError, match=r"cannot write .*cache.*larger than the file-size limit")
        with files_up_to(50_000), refusal:
            load(file)
        assert len(load(file)) == 20


class TestHub:
    @pytest.fixture(autouse=True)
    def unreachable(self, monkeypatch):
        """Nothing listens at the Hub's address."""
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    @pytest.mark.parametrize("opener", [load_images, load_streaming])
    def test_unreachable(self, opener):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"no file or folder someone/pictures here, and the .* cannot be reached"):
            opener(DataConfig(data="someone/pictures", streaming=opener is load_streaming))
        assert time.monotonic() - began < 15

    def test_copy_in_the_cache(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        file = write_parquet(tmp_path / "pictures.parquet", [file_bytes(picture(0))])
        rows = load(file)
        # What `datasets` keeps of a data set of the Hub: the same arrow files under the data set's name.
        (made,) = (tmp_path / "cache" / "parquet").glob("*/*/*/dataset_info.json")
        kept = tmp_path / "cache" / "someone___pictures" / "default" / "0.0.0" / ("a" * 40)
        kept.parent.mkdir(parents=True)
        made.parent.rename(kept)
        (kept / "parquet-train.arrow").rename(kept / "pictures-train.arrow")
        again = load("someone/pictures")
        assert (again.name, again.fingerprint) == ("someone/pictures", rows.fingerprint)
        assert "cannot be reached: using the copy of someone/pictures in the cache" in caplog.text
