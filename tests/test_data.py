import hashlib
import io
import logging
import os
import re
import resource
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sssd_zoo.configs import DataConfig, SettingsError
from sssd_zoo.data import images as images_module
from sssd_zoo.data.images import CorruptImageError, Encoded, decode, spaced
from sssd_zoo.data.loading import GlobalBatches, ImageData, load_images, split_names
from sssd_zoo.data.make_sample import SAMPLE, draw
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError

TEST_DATA = Path(os.environ.get("SSSD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
needs_data = pytest.mark.skipif(not TEST_DATA.is_dir(), reason=f"no development data at {TEST_DATA}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keeps what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_cache")
    # After each pass over a parquet stream `datasets` sleeps for 5 s, to be safe from a race at the interpreter's end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def picture(seed: int, width: int = 12, height: int | None = None) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height or width, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_parquet(path: Path, pictures: list[bytes], **columns) -> Path:
    """A parquet file as the Hub has them, with images in the column `image`."""
    features = {"image": datasets.Image()}
    data = {"image": [{"bytes": data, "path": None} for data in pictures], **columns}
    rows = datasets.Dataset.from_dict(data)
    rows = rows.cast(datasets.Features({**rows.features, **features}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.data.table, path)
    return path


def load(data, **options) -> ImageData:
    loader = {key: options.pop(key) for key in ("default_size", "require_labels", "verify") if key in options}
    return load_images(DataConfig(data=str(data), **options), progress=False, **loader)


def everything(data: ImageData, batch: int = 4, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    index, images = zip(*data.batches(torch.arange(len(data)).split(batch), workers=workers), strict=True)
    return torch.cat(index), torch.cat(images)


@pytest.fixture
def classes(tmp_path) -> Path:
    """Three classes of 2, 3 and 4 images."""
    for number, name in enumerate(("cat", "dog", "eel")):
        for seed in range(2 + number):
            write(tmp_path / "classes" / name / f"{seed}.png", picture(10 * number + seed))
    return tmp_path / "classes"


class TestSample:
    @pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
    def test_is_balanced_and_whole(self, split, count):
        data = load("cifar10-sample", split=split, require_labels=True)
        assert (data.name, data.split, data.size, len(data)) == ("cifar10-sample", split, 32, count)
        assert data.class_names == [
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ]
        assert np.bincount(data.labels).tolist() == [count // 10] * 10
        assert data.corrupt == []
        assert data.in_memory
        # Shuffled: the first thousand rows hold all classes.
        assert set(data.labels[:1000]) == set(range(10))

    def test_is_small_and_as_its_provenance_says(self):
        files = sorted(SAMPLE.glob("*.parquet"))
        assert sum(file.stat().st_size for file in files) <= 5_000_000
        provenance = (SAMPLE / "PROVENANCE.md").read_text()
        for file in files:
            assert hashlib.sha256(file.read_bytes()).hexdigest() in provenance

    def test_splits(self):
        assert split_names(DataConfig(data="cifar10-sample")) == ["train", "test"]

    @needs_data
    def test_bytes_are_those_of_the_source(self):
        for split in ("train", "test"):
            ours, theirs = (
                pq.read_table(folder / f"{split}.parquet").sort_by("label")
                for folder in (SAMPLE, TEST_DATA / "cifar10")
            )
            for label in range(10):
                small, large = (
                    set(
                        table.filter(pa.compute.equal(table["label"], label))["img"]
                        .combine_chunks()
                        .field("bytes")
                        .to_pylist()
                    )
                    for table in (ours, theirs)
                )
                assert small < large

    def test_draw(self):
        labels = np.random.default_rng(0).integers(0, 4, 400)
        rows = draw(labels, 40, np.random.default_rng(1))
        assert np.bincount(labels[rows]).tolist() == [10] * 4
        assert (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(rows, draw(labels, 40, np.random.default_rng(1)))
        with pytest.raises(ValueError, match="divided"):
            draw(labels, 41, np.random.default_rng(1))


class TestDecode:
    @pytest.mark.parametrize(
        ("mode", "kind", "colour"),
        [
            ("RGB", "JPEG", (204, 51, 0)),
            ("RGB", "PNG", (204, 51, 0)),
            ("RGB", "GIF", (204, 51, 0)),
            ("RGB", "WEBP", (204, 51, 0)),
            ("RGBA", "PNG", (204, 51, 0)),
            ("CMYK", "JPEG", (204, 51, 0)),
            ("CMYK", "TIFF", (204, 51, 0)),
            ("YCbCr", "JPEG", (204, 51, 0)),
            ("P", "PNG", (204, 51, 0)),
            ("L", "PNG", (91, 91, 91)),
            ("L", "JPEG", (91, 91, 91)),
            ("LA", "PNG", (91, 91, 91)),
            ("1", "PNG", (255, 255, 255)),
        ],
    )
    def test_every_mode_becomes_rgb(self, mode, kind, colour):
        source = Image.new("RGB", (8, 8), (255, 255, 255) if mode == "1" else (204, 51, 0))
        pixels = decode(Encoded(0, file_bytes(source.convert(mode), kind), None), 8)
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels[:, 4, 4], colour, atol=4)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_keep_the_upper_8(self, kind):
        grey = Image.fromarray(np.full((8, 8), 0x8042, np.uint16))
        assert (decode(Encoded(0, file_bytes(grey, kind), None), 8) == 0x80).all()

    @pytest.mark.parametrize(("value", "stored"), [(0.5, 127), (200.0, 200), (1000.0, 255), (-5.0, 0)])
    def test_floats(self, value, stored):
        grey = Image.fromarray(np.full((8, 8), value, np.float32))
        assert (decode(Encoded(0, file_bytes(grey, "TIFF"), None), 8) == stored).all()

    def test_transparent_palette(self):
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30])
        data = file_bytes(image, transparency=b"\x00")
        assert decode(Encoded(0, data, None), 8)[:, 0, 0].tolist() == [10, 20, 30]

    def test_first_frame(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert decode(Encoded(0, data, None), 8)[:, 0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_exif_orientation(self, kind):
        image = Image.new("RGB", (16, 16), "black")
        image.paste("white", (0, 0, 16, 4))  # a white top
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        pixels = decode(Encoded(0, file_bytes(image, kind, exif=exif), None), 16)
        assert pixels[:, 1].max() < 10
        assert pixels[:, 14].min() > 245

    def test_pixels_of_an_image_of_the_size_are_untouched(self):
        image = picture(0)
        expected = np.asarray(image).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(Encoded(0, file_bytes(image), None), 12), expected)

    @pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
    def test_the_middle_of_an_oblong_is_kept(self, width, height):
        image = Image.new("RGB", (width, height), "red")
        middle = Image.new("RGB", (20, 20), "blue")
        image.paste(middle, ((width - 20) // 2, (height - 20) // 2))
        pixels = decode(Encoded(0, file_bytes(image), None), 10)
        # The filter reaches one pixel beyond the crop.
        assert (pixels[:, 1:-1, 1:-1] == np.array([0, 0, 255])[:, None, None]).all()

    def test_large_jpegs_shrink_as_without_the_shortcut(self):
        smooth = picture(1, 8).resize((640, 480), Image.Resampling.BICUBIC)
        jpeg = file_bytes(smooth, "JPEG", quality=95)
        shortcut = decode(Encoded(0, jpeg, None), 64).astype(int)
        slow = decode(Encoded(0, file_bytes(Image.open(io.BytesIO(jpeg))), None), 64)
        assert np.abs(shortcut - slow).mean() < 1

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "empty"),
            (b"not an image", "not an image"),
            (file_bytes(picture(0, 64), "JPEG")[:-200], "truncated"),
            (file_bytes(picture(0, 64))[:-200], "truncated"),
            (file_bytes(picture(0, 64))[:20], ""),
        ],
    )
    def test_corrupt(self, data, reason):
        with pytest.raises(CorruptImageError, match=f"(?i){reason}") as error:
            decode(Encoded(0, data, None), 8)
        assert "\n" not in str(error.value)


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

    @pytest.mark.parametrize("nested", ["photos", "photos/2024/may"])
    def test_one_folder_is_no_class(self, tmp_path, nested):
        write(tmp_path / nested / "one.png", picture(0))
        assert load(tmp_path).labels is None

    def test_images_beside_class_folders(self, classes):
        write(classes / "stray.png", picture(99))
        data = load(classes)
        assert len(data) == 10
        assert data.labels is None

    def test_files_named_like_splits_stay_together(self, tmp_path):
        for name in ("a_test_1.png", "train_2.png", "val.png"):
            write(tmp_path / name, picture(0))
        assert split_names(DataConfig(data=str(tmp_path))) == ["train"]
        assert len(load(tmp_path)) == 3

    def test_split_folders_number_their_classes_alike(self, tmp_path):
        for place in ("train/cat", "train/dog", "train/eel", "val/cat", "val/eel"):
            write(tmp_path / place / "0.png", picture(0))
        train, validation = load(tmp_path), load(tmp_path, split="val")
        assert train.labels.tolist() == [0, 1, 2]
        assert (validation.split, validation.labels.tolist()) == ("validation", [0, 2])
        assert load(tmp_path, split="validation").fingerprint == validation.fingerprint

    def test_a_class_may_be_called_train(self, tmp_path):
        for name in ("bus", "car", "train"):
            write(tmp_path / name / "0.png", picture(0))
        assert load(tmp_path).class_names == ["bus", "car", "train"]

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


class TestStorageSize:
    @pytest.mark.parametrize(
        ("sides", "options", "size"),
        [
            ([(20, 20), (20, 20)], {}, 20),
            ([(20, 20), (24, 24)], {"default_size": 48}, 48),
            ([(20, 30), (20, 30)], {"default_size": 48}, 48),
            ([(97, 97), (97, 97)], {"default_size": 48}, 48),
            ([(20, 20), (20, 20)], {"storage_size": 16}, 16),
        ],
    )
    def test_is_natural_or_chosen(self, tmp_path, sides, options, size):
        for seed, (width, height) in enumerate(sides):
            write(tmp_path / f"{seed}.png", picture(seed, width, height))
        data = load(tmp_path, **options)
        assert data.size == size
        assert data.gather(torch.arange(2)).shape == (2, 3, size, size)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "test"}, "has no split 'test': choose one of train"),
            ({"image_column": "img"}, "no column 'img' for image_column: choose one of image, label"),
            ({"image_column": "label"}, "'label' of classes holds int64, not images"),
            ({"label_column": "kind"}, "no column 'kind' for label_column: choose one of image, label"),
            ({"label_column": "image"}, "not one class per row"),
            ({"storage_size": 0}, "storage_size is 0;"),
            ({"max_corrupt": -1}, "max_corrupt is -1;"),
            ({"streaming": True}, "pretraining only"),
        ],
    )
    def test_options(self, classes, options, message):
        with pytest.raises((UserError, SettingsError), match=message):
            load(classes, **options)

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

    def test_parquet_without_images(self, tmp_path):
        pq.write_table(pa.table({"image": ["a", "b"], "text": ["c", "d"]}), tmp_path / "text.parquet")
        with pytest.raises(UserError, match="no column of images: it has image, text"):
            load(tmp_path / "text.parquet")

    def test_several_image_columns(self, tmp_path):
        data = [{"bytes": file_bytes(picture(0)), "path": None}]
        rows = datasets.Dataset.from_dict(
            {"left": data, "right": data}, features=datasets.Features(left=datasets.Image(), right=datasets.Image())
        )
        rows.save_to_disk(tmp_path / "pairs")
        with pytest.raises(UserError, match="several columns of images, left, right"):
            load(tmp_path / "pairs")
        assert len(load(tmp_path / "pairs", image_column="right")) == 1

    def test_split_must_be_chosen(self, tmp_path):
        for split in ("test", "validation"):
            write_parquet(tmp_path / f"{split}.parquet", [file_bytes(picture(0))])
        with pytest.raises(UserError, match="choose one with split: test, validation"):
            load(tmp_path)

    def test_parts_of_a_split(self):
        whole = load("cifar10-sample", split="test")
        part = load("cifar10-sample", split="test[1000:1300]", require_labels=True)
        assert (part.split, len(part), part.class_names) == ("test[1000:1300]", 300, whole.class_names)
        assert torch.equal(part.gather(torch.arange(300)), whole.gather(torch.arange(1000, 1300)))
        assert part.labels.tolist() == whole.labels[1000:1300].tolist()
        assert part.fingerprint != whole.fingerprint
        share = load("cifar10-sample", split="test[50%:65%]")
        assert (share.split, share.fingerprint) == ("test[50%:65%]", part.fingerprint)
        assert len(load("cifar10-sample", split="test[:7]")) == 7
        assert len(load("cifar10-sample", split="test[1990:]")) == 10
        for wrong in ("test[", "test[5]", "test[-5:]", "test[a:b]"):
            with pytest.raises(UserError, match="write a part of a split like"):
                load("cifar10-sample", split=wrong)
        with pytest.raises(UserError, match="no rows in 'test\\[2000:\\]': test has 2000"):
            load("cifar10-sample", split="test[2000:]")
        with pytest.raises(UserError, match="no split 'dev'"):
            load("cifar10-sample", split="dev[:10]")
        with pytest.raises(UserError, match="no part of a split"):
            load_streaming(DataConfig(data="cifar10-sample", split="test[:10]"))

    def test_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        pictures = [file_bytes(picture(seed, 64)) for seed in range(20)]
        file = write_parquet(tmp_path / "my.parquet", pictures)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot write .*cache.*larger than the file-size limit"):
                load(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert len(load(file)) == 20


class TestLabels:
    def test_required_but_absent(self, tmp_path):
        write(tmp_path / "0.png", picture(0))
        with pytest.raises(UserError, match=r"has no labels, which this step needs.*columns: image\)"):
            load(tmp_path, require_labels=True)

    @pytest.mark.parametrize("labels", [[-1, -1, -1], [None, None, None]])
    def test_unlabelled_split(self, tmp_path, labels):
        file = write_parquet(tmp_path / "my.parquet", [file_bytes(picture(0))] * 3, label=pa.array(labels, pa.int64()))
        assert load(file).labels is None
        with pytest.raises(UserError, match="3 of 3 rows of my"):
            load(file, require_labels=True)

    @pytest.mark.parametrize("labels", [[0, 1, -1], ["a", None, "b"]])
    def test_partly_labelled(self, tmp_path, labels, caplog):
        file = write_parquet(tmp_path / "my.parquet", [file_bytes(picture(0))] * 3, label=labels)
        assert load(file).labels is None
        assert "1 of 3 rows" in caplog.text
        with pytest.raises(UserError, match="1 of 3 rows of my"):
            load(file, require_labels=True)

    def test_folder_without_images_is_no_class(self, classes):
        (classes / "fox").mkdir()
        (classes / "fox" / "notes.txt").write_text("none yet")
        assert load(classes, require_labels=True).class_names == ["cat", "dog", "eel"]

    def test_class_label_without_rows(self, tmp_path):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
        rows = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "label": [2, 0]}, features=features)
        rows.save_to_disk(tmp_path / "rows")
        data = load(tmp_path / "rows")
        assert (data.labels.tolist(), data.class_names) == ([2, 0], ["a", "b", "c"])
        with pytest.raises(UserError, match=r"1 of 3 classes have no rows in rows \(train\): b"):
            load(tmp_path / "rows", require_labels=True)

    def test_fine_before_coarse(self, tmp_path):
        names = datasets.ClassLabel(names=["a", "b"])
        features = datasets.Features(img=datasets.Image(), coarse_label=names, fine_label=names)
        columns = {"img": [picture(0), picture(1)], "coarse_label": [0, 0], "fine_label": [1, 0]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "rows")
        assert load(tmp_path / "rows").labels.tolist() == [1, 0]
        assert load(tmp_path / "rows", label_column="coarse_label").labels.tolist() == [0, 0]


class TestCorrupt:
    @pytest.fixture
    def broken(self, classes) -> Path:
        (classes / "dog" / "1.png").write_bytes(b"nonsense")
        (classes / "eel" / "0.png").write_bytes(file_bytes(picture(0))[:-100])
        (classes / "eel" / "gone.png").symlink_to(classes / "nowhere.png")
        return classes

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_over_the_limit(self, broken, in_memory):
        with pytest.raises(UserError) as error:
            load(broken, in_memory=in_memory, max_corrupt=2)
        message = str(error.value)
        assert message.startswith("3 images of classes (train) cannot be decoded, more than max_corrupt 2 (")
        for name in ("dog/1.png: it is not an image", "eel/0.png: ", "eel/gone.png: No such file"):
            assert name in message

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_skipped_counted_named(self, broken, in_memory, caplog):
        data = load(broken, in_memory=in_memory, max_corrupt=3)
        assert data.rows.tolist() == [0, 1, 2, 4, 6, 7, 8]  # 3, 5 and 9 are corrupt
        assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
        assert [Path(name).name for name, _ in data.corrupt] == ["1.png", "0.png", "gone.png"]
        assert "skipped 3 corrupt images of classes (train), 3 so far" in caplog.text
        assert str(broken / "dog" / "1.png") in caplog.text
        _, images = everything(data)
        np.testing.assert_array_equal(images[3], np.asarray(Image.open(broken / "dog" / "2.png")).transpose(2, 0, 1))

    def test_rows_are_named_by_number(self, tmp_path):
        file = write_parquet(tmp_path / "my.parquet", [file_bytes(picture(0)), b"x", file_bytes(picture(1))])
        with pytest.raises(UserError, match=r"1 images .*\(row 1: it is not an image"):
            load(file)
        assert load(file, max_corrupt=1).corrupt == [
            (1, "it is not an image of a known format, or of pixels that Pillow does not read")
        ]

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_all_corrupt(self, tmp_path, in_memory):
        file = write_parquet(tmp_path / "my.parquet", [b"x", b"y"])
        with pytest.raises(UserError, match="none of 2 images"):
            load(file, in_memory=in_memory, max_corrupt=5)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_found_late(self, broken, workers, caplog):
        data = load(broken, in_memory=False, verify=False, max_corrupt=3)
        assert (len(data), data.corrupt) == (10, [])
        with caplog.at_level(logging.WARNING):
            index, images = everything(data, batch=5, workers=workers)
        assert images.shape == (10, 3, 12, 12)
        # Of the batches 0..4 and 5..9, 3 and then 5 and 9 are replaced by good ones beside them, and named.
        assert index.tolist() == [0, 1, 2, 0, 4, 6, 6, 7, 8, 7]
        assert torch.equal(images[3], images[0])
        assert len(data.corrupt) == 3
        assert caplog.text.count("skipped") == 2
        everything(data, batch=5, workers=workers)  # known now, and not counted again
        assert len(data.corrupt) == 3

    @pytest.mark.parametrize("workers", [0, 2])
    def test_found_late_and_over_the_limit(self, broken, workers):
        data = load(broken, in_memory=False, verify=False, max_corrupt=1)
        with pytest.raises(UserError, match=r"3 images .*more than max_corrupt 1 .*dog/1.png"):
            everything(data, batch=5, workers=workers)
        data = load(broken, in_memory=False, verify=False, max_corrupt=9)
        with pytest.raises(UserError, match="none of 1 images"):
            everything(data, batch=1, workers=workers)


class TestBackends:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_give_the_same_batches(self, classes, workers):
        memory, disk = load(classes), load(classes, in_memory=False)
        assert (memory.in_memory, disk.in_memory) == (True, False)
        order = [torch.tensor([3, 1]), torch.tensor([8, 8, 0])]
        for left, right in zip(memory.batches(order), disk.batches(order, workers=workers), strict=True):
            assert left[1].dtype == torch.uint8
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
        assert torch.equal(memory.gather(order[1]), disk.gather(order[1]))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_leave_the_global_random_numbers_alone(self, classes, workers):
        data = load(classes, in_memory=False)
        torch.manual_seed(0)
        everything(data, workers=workers)
        after = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(3))

    def test_too_large_for_memory(self, classes, monkeypatch):
        class Memory:
            available = 2 * 9 * 3 * 12 * 12 - 1

        monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
        assert not load(classes).in_memory
        Memory.available += 1
        assert load(classes).in_memory


class TestFingerprint:
    def test_depends_on_content_and_order_only(self, tmp_path):
        pictures = [file_bytes(picture(seed)) for seed in range(6)]
        first = load(write_parquet(tmp_path / "a.parquet", pictures, label=[0, 1, 0, 1, 0, 1]))
        for number, data in enumerate(pictures):
            write(tmp_path / "folder" / "x.png", picture(0)).with_name(f"{number}.png").write_bytes(data)
        (tmp_path / "folder" / "x.png").unlink()
        same = [
            load(tmp_path / "a.parquet", in_memory=False),
            load(tmp_path / "a.parquet", storage_size=5),
            load(tmp_path / "folder"),
            load(write_parquet(tmp_path / "b.parquet", pictures)),
        ]
        assert {data.fingerprint for data in same} == {first.fingerprint}
        assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)

        swapped = [*pictures[:2], pictures[3], pictures[2], *pictures[4:]]
        joined = [pictures[0] + pictures[1], b"", *pictures[2:]]
        others = [swapped, pictures[:-1], [*pictures, pictures[0]], joined]
        prints = [
            load(write_parquet(tmp_path / f"other{number}.parquet", other), max_corrupt=9).fingerprint
            for number, other in enumerate(others)
        ]
        assert len({first.fingerprint, *prints}) == 5

    def test_of_large_sets_is_sampled(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images_module, "FULL_FINGERPRINT", 9)
        monkeypatch.setattr(images_module, "SAMPLED_FINGERPRINT", 4)
        assert spaced(10, 4).tolist() == [0, 3, 6, 9]
        pictures = [file_bytes(picture(seed)) for seed in range(10)]

        def of(name: str, data: list[bytes]) -> str:
            return load(write_parquet(tmp_path / f"{name}.parquet", data)).fingerprint

        first = of("first", pictures)
        assert of("unseen", [*pictures[:4], pictures[0], *pictures[5:]]) == first
        assert of("seen", [*pictures[:3], pictures[0], *pictures[4:]]) != first
        assert of("longer", [*pictures[:9], pictures[0], pictures[9]]) != first


class TestGlobalBatches:
    @pytest.mark.parametrize("world", [2, 4])
    def test_processes_share_what_one_would_see(self, world):
        one = GlobalBatches(50, 8, seed=3)
        parts = [GlobalBatches(50, 8, seed=3, rank=rank, world=world) for rank in range(world)]
        assert {loader.steps_per_epoch for loader in (one, *parts)} == {6}
        for epoch in range(2):
            batches = zip(*(part.epoch(epoch) for part in parts), strict=True)
            for whole, split in zip(one.epoch(epoch), batches, strict=True):
                assert {len(part) for part in split} == {8 // world}
                assert torch.equal(whole, torch.cat(split))

    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(seed: int, epoch: int) -> list[int]:
            return torch.cat(list(GlobalBatches(40, 8, seed).epoch(epoch))).tolist()

        assert order(0, 0) == order(0, 0)
        assert sorted(order(0, 0)) == list(range(40))
        assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16

    def test_start_resumes(self):
        batches = GlobalBatches(50, 8, seed=1)
        whole = list(batches.epoch(2))
        for start in (0, 3, 5, 6):
            rest = list(batches.epoch(2, start))
            assert len(rest) == 6 - start
            assert all(torch.equal(left, right) for left, right in zip(rest, whole[start:], strict=True))

    def test_in_order_and_whole(self):
        parts = [GlobalBatches(11, 4, 0, rank=rank, world=2, shuffle=False, drop_last=False) for rank in range(2)]
        assert parts[0].steps_per_epoch == 3
        batches = [list(part.epoch(0)) for part in parts]
        assert torch.cat([part for step in zip(*batches, strict=True) for part in step]).tolist() == list(range(11))

    def test_global_random_numbers_are_left_alone(self):
        torch.manual_seed(0)
        list(GlobalBatches(50, 8, seed=1).epoch(0))
        after = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(after, torch.rand(3))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 9}, "larger than the data set, 8 images"),
            ({"batch_size": 7, "world": 2}, "multiple of the 2 processes"),
            ({"batch_size": 0}, "positive"),
        ],
    )
    def test_bad_sizes(self, options, message):
        with pytest.raises(UserError, match=message):
            GlobalBatches(8, seed=0, **options)


class TestStreaming:
    COUNT = 24

    @pytest.fixture(params=["folder", "parquet"])
    def data(self, request, tmp_path) -> Path:
        """Images that are their number in every pixel."""
        pictures = [Image.new("RGB", (12, 12), (seed, seed, seed)) for seed in range(self.COUNT)]
        if request.param == "parquet":
            return write_parquet(tmp_path / "my.parquet", [file_bytes(image) for image in pictures])
        for seed, image in enumerate(pictures):
            write(tmp_path / "pictures" / f"{seed:02}.png", image)
        return tmp_path / "pictures"

    @staticmethod
    def numbers(data, steps: int, batch: int = 4, **options) -> list[int]:
        stream = load_streaming(DataConfig(data=str(data), streaming=True, max_corrupt=options.pop("max_corrupt", 0)))
        found = []
        for step, (index, images) in zip(
            range(steps), stream.batches(batch, **{"seed": 0, "epoch": 0, **options}), strict=False
        ):
            part = batch // options.get("world", 1)
            assert images.shape == (part, 3, 12, 12)
            assert images.dtype == torch.uint8
            assert (index // part == step + options.get("start", 0)).all()
            found += images[:, 0, 0, 0].tolist()
        return found

    def test_passes_over_all_and_goes_on(self, data):
        seen = self.numbers(data, 2 * self.COUNT // 4)
        first, second = seen[: self.COUNT], seen[self.COUNT :]
        assert sorted(first) == sorted(second) == list(range(self.COUNT))
        assert first != second
        assert first != list(range(self.COUNT))

    def test_order_is_a_function_of_seed_and_epoch(self, data):
        assert self.numbers(data, 6) == self.numbers(data, 6)
        assert self.numbers(data, 6) != self.numbers(data, 6, epoch=1)
        assert self.numbers(data, 6) != self.numbers(data, 6, seed=7)

    def test_start_resumes(self, data):
        whole = self.numbers(data, 9, epoch=2)
        assert self.numbers(data, 4, epoch=2, start=5) == whole[20:]

    def test_processes_share_the_rows(self, data):
        parts = [self.numbers(data, 6, rank=rank, world=2) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(self.COUNT))

    def test_corrupt(self, tmp_path, caplog):
        pictures = [file_bytes(Image.new("RGB", (12, 12), (n, n, n))) for n in range(8)]
        file = write_parquet(tmp_path / "my.parquet", [*pictures[:3], b"x", *pictures[4:]])
        seen = self.numbers(file, 4, max_corrupt=1)  # two passes: the image is counted once
        assert len(seen) == 16
        assert 3 not in seen
        assert f"image {hashlib.sha256(b'x').hexdigest()[:12]}: it is not an image" in caplog.text
        with pytest.raises(UserError, match=r"1 images of .* more than max_corrupt 0"):
            self.numbers(file, 4)

    def test_bad_input(self, data, tmp_path):
        with pytest.raises(UserError, match="multiple of the 3 processes"):
            self.numbers(data, 1, world=3)
        with pytest.raises(UserError, match="fewer rows than there are processes"):
            self.numbers(write_parquet(tmp_path / "one.parquet", [file_bytes(picture(0))]), 1, rank=1, world=2)
        with pytest.raises(UserError, match="has no rows"):
            load_streaming(DataConfig(data=str(write_parquet(tmp_path / "none.parquet", [])), streaming=True))


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
