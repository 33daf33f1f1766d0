"""Data that are not what they seem: read as `datasets` reads them, or refused, or told of; none goes by in silence.

With real files: links, pipes, names of all kinds, layouts of folders, and tables of labels as tools write them.
"""

import json
import os
import shutil
import socket
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from helpers.commands import one_line, sssd
from helpers.data import load
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.formats import EXTENSIONS
from sssd_zoo.data.loading import split_names
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import plural
from sssd_zoo.files import RUN_MARK
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline.predict import find_images

TINY = ("--cluster.k", "2", *(f"--{step}.batch_size=4" for step in ("pretrain", "distill")), "--pretrain.queue_size=4")


def tree(root: Path, **counts: int) -> Path:
    """A folder of images, so many in each sub-folder; `__` in a name stands for `/`, `_here` for the folder itself."""
    seed = 0
    for place, count in counts.items():
        folder = root if place == "_here" else root / place.replace("__", "/")
        for number in range(count):
            write(folder / f"{number}.png", picture(seed, 8))
            seed += 1
    return root


def counts(data: Path, **options) -> dict[str, tuple[int, list[str] | None]]:
    """Of each split its number of images and its classes."""
    found = {}
    for split in split_names(DataConfig(data=str(data), **options)):
        split_data = load(data, split=split, **options)
        found[split] = len(split_data), split_data.class_names
    return found


class TestWalk:
    """Each file once, regular files only; training and `sssd predict` see the same."""

    @staticmethod
    def names(root: Path) -> list[str]:
        read = [path.relative_to(root).as_posix() for path in find_images([str(root)])]
        assert len(load(root, unlabelled=True)) == len(read)
        return read

    def test_links_to_folders_above_and_beside(self, tmp_path, caplog):
        data = tree(tmp_path / "data", cat=2, dog=2)
        (data / "cat" / "all").symlink_to("..")
        (data / "cat" / "self").symlink_to(".")
        (data / "a_first").symlink_to("dog")
        (data / "up").symlink_to(tmp_path)
        (data / "round").symlink_to("round")
        assert self.names(data) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
        assert load(data).class_names == ["cat", "dog"]
        assert "4 links to what is read already (a_first, up, cat/all, cat/self)" in caplog.text

    def test_links_to_files(self, tmp_path, caplog):
        data = tree(tmp_path / "data", _here=2)
        (data / "again.png").symlink_to("1.png")
        os.link(data / "0.png", data / "hard.png")
        assert self.names(data) == ["0.png", "1.png"]
        assert "2 links to what is read already (hard.png, again.png)" in caplog.text

    def test_links_out_of_the_folder_are_followed(self, tmp_path):
        other = tree(tmp_path / "other", cat=2, dog=1)
        data = tmp_path / "data"
        data.mkdir()
        (data / "cat").symlink_to(other / "cat")
        (data / "dog").symlink_to(other / "dog")
        assert self.names(data) == ["cat/0.png", "cat/1.png", "dog/0.png"]
        assert load(data).labels.tolist() == [0, 0, 1]

    def test_pipes_sockets_and_devices(self, tmp_path, caplog, monkeypatch):
        data = tree(tmp_path / "data", _here=1)
        os.mkfifo(data / "pipe.png")
        (data / "zero.jpg").symlink_to("/dev/zero")
        monkeypatch.chdir(data)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
            assert self.names(data) == ["0.png"]
        assert "3 pipes, sockets or devices (pipe.png, socket.png, zero.jpg)" in caplog.text
        with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
            find_images([str(data / "pipe.png")])
        with pytest.raises(UserError, match="neither a file nor a folder"):
            load(data / "pipe.png")

    def test_rows_that_name_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        rows = pd.DataFrame({"image": [{"bytes": None, "path": str(tmp_path / "pipe.png")}] * 2})
        rows.to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"pipe\.png: it is not a regular file"):
            load(tmp_path / "rows.parquet")

    def test_names_that_are_no_utf8(self, tmp_path, caplog):
        data = tree(tmp_path / "data", _here=1)
        shutil.copy(data / "0.png", os.fsencode(data) + b"/caf\xe9.png")
        os.mkdir(os.fsencode(data) + b"/\xff")  # noqa: PTH102  no Path of bytes
        shutil.copy(data / "0.png", os.fsencode(data) + b"/\xff/1.png")
        assert self.names(data) == ["0.png"]
        assert r"2 names that are not UTF-8, rename them (caf\xe9.png, \xff)" in caplog.text
        with pytest.raises(UserError, match=r"the name of .*data/\\xff is not UTF-8: rename it"):
            load(os.fsdecode(os.fsencode(data) + b"/\xff"))

    def test_hidden_files_and_what_systems_leave(self, tmp_path):
        data = tree(tmp_path / "data", _here=1, __MACOSX=1)
        for name in (".hidden/0.png", "._0.png", "@eaDir/0.png", "__MACOSX/0.png", "$RECYCLE.BIN/0.png"):
            write(data / name, picture(0, 8)) if name != "._0.png" else (data / name).write_bytes(b"AppleDouble")
        assert self.names(data) == ["0.png"]

    @pytest.mark.parametrize("files", [[RUN_MARK], ["config.yaml", "steps/x.json"], ["config.yaml", "checkpoints/x"]])
    def test_run_folders_are_no_data(self, tmp_path, caplog, files):
        data = tree(tmp_path / "photos", _here=3, run__figures=2, more=1)
        for name in files:
            (data / "run" / name).parent.mkdir(exist_ok=True)
            (data / "run" / name).write_text("{}")
        assert self.names(data) == ["0.png", "1.png", "2.png", "more/0.png"]
        assert "1 run folders of this package (run)" in caplog.text

    def test_a_run_folder_itself(self, tmp_path):
        data = tree(tmp_path / "run", _here=3)
        (data / RUN_MARK).write_text("{}")
        for read in (load, lambda folder: find_images([str(folder)])):
            with pytest.raises(
                UserError, match=r"run is a run folder of this package \(\.sssd-zoo\.json marks it\), not data"
            ):
                read(data)

    def test_kinds_that_are_not_read(self, tmp_path, caplog):
        data = tree(tmp_path / "data", _here=1)
        for name in ("a.NEF", "b.nef", "c.npy", "d.nii", "e.zip", "notes.txt"):
            (data / name).write_bytes(b"x")
        assert self.names(data) == ["0.png"]
        assert "2 .nef files (camera RAW: convert them to TIFF or JPEG" in caplog.text
        assert "1 .npy file (arrays: give --channels" in caplog.text
        assert ".txt" not in caplog.text
        (data / "0.png").unlink()
        for read in (load, lambda folder: find_images([str(folder)])):
            with pytest.raises(UserError, match=r"holds no images that can be read: 2 \.nef files .*1 \.zip file "):
                read(data)

    @pytest.mark.parametrize("kind", ["avif", "heic", "jxl"])
    def test_kinds_that_plugins_decode(self, tmp_path, caplog, kind):
        path = tmp_path / "data" / f"1.{kind}"
        path.parent.mkdir()
        if f".{kind}" in EXTENSIONS:
            picture(0, 8).save(path)
            assert self.names(path.parent) == [path.name]
        else:
            path.write_bytes(b"x")
            with pytest.raises(UserError, match=rf"1 \.{kind} file \(pip install "):
                load(path.parent)

    def test_git_lfs_pointers(self, tmp_path):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
        for name in ("images/0.png", "images/1.png", "tables/train.parquet", "saved/data-0.arrow", "saved/state.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(pointer)
        for folder in ("images", "tables", "tables/train.parquet", "saved"):
            with pytest.raises(UserError, match=r"git-lfs pointer.*run `git lfs pull`"):
                load(tmp_path / folder)

    def test_a_path_that_datasets_would_take_apart(self, tmp_path):
        file = write_parquet(tmp_path / "a::b" / "train.parquet", [file_bytes(picture(0))])
        with pytest.raises(UserError, match=r"a::b/train\.parquet has '::'.*rename it"):
            load(file)

    @pytest.mark.parametrize("name", ["set[1]", "set*", "se?1", "{set}", "a%20b", "a#b", "ends with space "])
    def test_signs_of_patterns_in_a_path(self, tmp_path, name):
        tree(tmp_path / "set1", cat=1, dog=1)
        tree(tmp_path / name / "images", cat=2, dog=2)
        write_parquet(tmp_path / "set1" / "rows" / "train.parquet", [file_bytes(picture(0))])
        rows = write_parquet(tmp_path / name / "rows" / "train.parquet", [file_bytes(picture(1))] * 3, label=[0, 1, 0])
        assert len(load(tmp_path / name / "images")) == 4
        assert len(load(tmp_path / name / "rows")) == 3
        assert len(load(rows)) == 3
        saved = datasets.Dataset.from_dict({"image": [picture(0)]}, features=datasets.Features(image=datasets.Image()))
        saved.save_to_disk(tmp_path / name / "saved")
        assert len(load(tmp_path / name / "saved")) == 1
        described = tree(tmp_path / name / "described", _here=2)
        (described / "metadata.csv").write_text("file_name,label\n0.png,a\n1.png,b\n")
        assert load(described).class_names == ["a", "b"]
        stream = load_streaming(DataConfig(data=str(tmp_path / name / "rows"), streaming=True))
        assert next(stream.batches(2, 0, 0))[1].shape == (2, 3, 12, 12)


class TestSplits:
    """Which images are trained on, by the names of folders and files."""

    @pytest.mark.parametrize(
        ("folders", "expected"),
        [
            ({"train__cat": 3, "train__dog": 1, "test__cat": 2},
             {"train": (4, ["cat", "dog"]), "test": (2, ["cat", "dog"])}),
            ({"train2017": 3, "val2017": 2, "test2017": 1},
             {"train": (3, None), "validation": (2, None), "test": (1, None)}),
            ({"train_images": 3, "test_images": 2}, {"train": (3, None), "test": (2, None)}),
            ({"images_train": 3, "images_val": 2}, {"train": (3, None), "validation": (2, None)}),
            ({"my-train": 3, "eval": 2}, {"train": (3, None), "test": (2, None)}),
            ({"Train": 3, "TEST": 2}, {"train": (3, None), "test": (2, None)}),
            ({"train1": 3, "train2": 2}, {"train": (5, None)}),
            ({"imagenet__train__cat": 3, "imagenet__train__dog": 1, "imagenet__val__cat": 1},
             {"train": (4, ["cat", "dog"]), "validation": (1, ["cat", "dog"])}),
            ({"train__images__cat": 3, "train__images__dog": 1, "test__images__dog": 1},
             {"train": (4, ["cat", "dog"]), "test": (1, ["cat", "dog"])}),
            # Tiny ImageNet's.
            ({"train__n01__images": 3, "train__n02__images": 1, "val__images": 2},
             {"train": (4, ["n01", "n02"]), "validation": (2, None)}),
            ({"train__cat": 3, "train__dog": 1, "test__unknown": 2}, {"train": (4, ["cat", "dog"]), "test": (2, None)}),
            ({"bus": 2, "car": 1, "train": 1}, {"train": (4, ["bus", "car", "train"])}),
            ({"bullet_train": 2, "freight_train": 1, "car": 1},
             {"train": (4, ["bullet_train", "car", "freight_train"])}),
            ({"photos__cat": 2, "photos__dog": 1}, {"train": (3, ["cat", "dog"])}),
        ],
    )  # fmt: skip
    def test_by_folders(self, tmp_path, folders, expected):
        assert counts(tree(tmp_path / "data", **folders)) == expected

    @pytest.mark.parametrize(
        ("folders", "count"), [({"_here": 1}, 1), ({"samples": 2}, 2), ({"_here": 1, "cat": 1, "samples": 1}, 3)]
    )
    def test_what_lies_beside_splits_is_left_out(self, tmp_path, caplog, folders, count):
        data = tree(tmp_path / "data", train__cat=3, train__dog=2, test__cat=1, **folders)
        assert counts(data) == {"train": (5, ["cat", "dog"]), "test": (1, ["cat", "dog"])}
        assert f"left out {plural(count, 'image')} of {data} beside the folders of its splits (" in caplog.text

    @pytest.mark.parametrize(
        ("folders", "message"),
        [
            ({"test": 1, "_here": 3}, r"named like splits \(test\) beside others \(images\)"),
            ({"test": 1, "cat": 3, "dog": 3}, r"named like splits \(test\) beside others \(cat, dog\)"),
            ({"train": 1, "samples": 3}, r"named like splits \(train\) beside others \(samples\)"),
            ({"unlabeled": 1, "cat": 3, "dog": 3}, r"named like splits \(unlabeled\) beside others \(cat, dog\)"),
            ({"test": 1, "val": 1, "images": 3}, r"named like splits \(test, val\) beside others \(images\)"),
            ({"my_train": 1, "other-test": 1, "cat": 3}, r"\(my_train, other-test\) beside others \(cat\)"),
            ({"bottle__train": 3, "bottle__test": 1, "cable__train": 3, "cable__test": 1},
             r"splits in a sub-folder, bottle \(test, train\): give that folder itself"),
            ({"imagenet__train": 3, "imagenet__val": 1, "_here": 1}, r"splits in a sub-folder, imagenet"),
            ({"train__train__cat": 3, "train__val__cat": 1}, r"splits in a sub-folder, train \(train, val\)"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("unlabelled", [False, True])
    def test_refused_where_not_clear(self, tmp_path, folders, message, unlabelled):
        with pytest.raises(UserError, match=message):
            load(tree(tmp_path / "data", **folders), unlabelled=unlabelled)

    def test_by_names_of_files(self, tmp_path):
        for name in ("cat/train_001.png", "cat/test_001.png", "dog/train_002.png"):
            write(tmp_path / "data" / name, picture(0, 8))
        assert counts(tmp_path / "data") == {"train": (2, ["cat", "dog"]), "test": (1, ["cat", "dog"])}
        write(tmp_path / "data" / "dog" / "photo.png", picture(0, 8))
        with pytest.raises(UserError, match=r"the names of 3 of 4 images .* tell of splits \(test_001, train_001"):
            load(tmp_path / "data")

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["train2017", "test2017"], {"train", "test"}),
            (["my_train", "evaluation"], {"train", "test"}),
            (["train-00000-of-00002", "train-00001-of-00002", "fold_1-00000-of-00001"], {"train", "fold_1"}),
            (["val-00000-of-00001", "training"], {"validation", "train"}),
            (["test_data/part-0", "part-0"], {"test", "train"}),
        ],
    )
    def test_of_parquet_files(self, tmp_path, names, expected):
        for name in names:
            write_parquet(tmp_path / "data" / f"{name}.parquet", [file_bytes(picture(0, 8))])
        assert set(split_names(DataConfig(data=str(tmp_path / "data")))) == expected

    @pytest.mark.parametrize(
        "folders",
        [
            {"train__cat": 2, "train__dog": 1, "test__cat": 1, "test__dog": 1},
            {"train_images__cat": 2, "train_images__dog": 1, "test_images__cat": 1, "test_images__dog": 1},
            {"set__train2__cat": 2, "set__train2__dog": 1, "set__val2__cat": 1, "set__val2__dog": 1},
            {"cat": 2, "dog": 1},
            {"cat": 2, "dog": 1, "_here": 1},
            {"photos__cat": 2, "photos__dog": 1},
        ],
    )
    def test_as_datasets_has_them(self, tmp_path, folders):
        data = tree(tmp_path / "data", **folders)
        theirs = datasets.load_dataset("imagefolder", data_dir=str(data))
        expected = {
            split: (len(rows), rows.features["label"].names if "label" in rows.features else None)
            for split, rows in theirs.items()
        }
        assert counts(data) == expected


class TestClasses:
    """Which sub-folders are classes, and what their names are."""

    @pytest.mark.parametrize(
        "folders",
        [{"2023__05": 2, "2023__06": 1, "2024__05": 1}, {"cat": 2, "cat__small": 1, "dog": 1}],
    )
    def test_sub_folders_of_sub_folders(self, tmp_path, folders):
        data = tree(tmp_path / "photos", **folders)
        with pytest.raises(UserError, match=r"which folders are its classes is not clear: give --unlabelled if none"):
            load(data)
        assert counts(data, unlabelled=True) == {"train": (4, None)}
        assert load_streaming(DataConfig(data=str(data), streaming=True)).name == "photos"

    def test_flag(self, tmp_path):
        data = tree(tmp_path / "photos", train__may=2, train__june=1, test__may=1)
        assert counts(data, unlabelled=True) == {"train": (3, None), "test": (1, None)}
        for options in ({"require_labels": True}, {"label_column": "label"}):
            with pytest.raises(UserError, match="--unlabelled leaves out the labels"):
                load(data, unlabelled=True, **options)

    def test_images_beside_class_folders_are_told_of(self, tmp_path, caplog):
        assert load(tree(tmp_path / "data", cat=1, dog=1, _here=2)).labels is None
        assert "has no labels: 2 of its images lie beside the sub-folders (0.png, 1.png)" in caplog.text
        assert "--unlabelled" in caplog.text

    def test_dates_are_told_from_classes(self, tmp_path, capsys):
        data = tree(tmp_path / "photos", **{f"2024-{month:02}": 1 + month % 2 for month in range(1, 7)})
        assert sssd("fit", "--data", data, "--out", tmp_path / "run", *TINY) == 2
        error = one_line(capsys)
        assert "6 classes of photos" in error
        assert "3 of them have one image only (2024-02, 2024-04, 2024-06)" in error
        assert "--unlabelled" in error

    def test_unicode_of_macos_and_linux(self, tmp_path):
        apple, other = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
        data = tree(tmp_path / "data", **{f"train__{apple}": 2, "train__tea": 1, f"test__{other}": 1, "test__tea": 1})
        assert counts(data) == {"train": (3, [other, "tea"]), "test": (2, [other, "tea"])}
        assert load(data, split="test", require_labels=True).labels.tolist() == [0, 1]
        pictures = [file_bytes(picture(0, 8))] * 3
        write_parquet(tmp_path / "rows" / "train.parquet", pictures, label=[apple, "tea", other])
        write_parquet(tmp_path / "rows" / "test.parquet", pictures, label=[other, "tea", "tea"])
        assert load(tmp_path / "rows").labels.tolist() == [0, 1, 0]
        assert load(tmp_path / "rows", split="test").class_names == [other, "tea"]
        rows = datasets.Dataset.from_dict(
            {"image": [picture(0, 8)] * 3, "label": [0, 1, 2]},
            features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[other, "tea", apple])),
        )
        rows.save_to_disk(tmp_path / "saved")
        data = load(tmp_path / "saved", require_labels=True)
        assert (data.labels.tolist(), data.class_names) == ([0, 1, 0], [other, "tea"])

    def test_missing_class_is_named(self, tmp_path, capsys):
        data = tree(tmp_path / "data", train__cat=4, train__dog=4, test__cat=1, test__dog=1, test__eel=1)
        with pytest.raises(UserError, match=r"1 of 3 classes have no rows in data \(train\): eel"):
            load(data, require_labels=True)
        assert sssd("fit", "--data", data, "--out", tmp_path / "run", *TINY) == 2
        assert "class 'eel' has no training images" in one_line(capsys)


class TestMetadata:
    """metadata.csv, .jsonl and .parquet are read as `datasets` reads them."""

    @staticmethod
    def describe(folder: Path, kind: str, rows: pd.DataFrame) -> None:
        if kind == "csv":
            rows.to_csv(folder / "metadata.csv", index=False)
        elif kind == "jsonl":
            rows.to_json(folder / "metadata.jsonl", orient="records", lines=True)
        else:
            rows.to_parquet(folder / "metadata.parquet", index=False)

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_labels(self, tmp_path, kind, caplog):
        data = tree(tmp_path / "data", _here=4)
        rows = pd.DataFrame({"file_name": ["2.png", "0.png", "1.png"], "label": ["dog", "cat", "dog"]})
        self.describe(data, kind, rows)
        found = load(data, require_labels=True)
        assert (found.labels.tolist(), found.class_names) == ([1, 0, 1], ["cat", "dog"])
        np.testing.assert_array_equal(found.gather(torch.tensor([0]))[0], np.asarray(picture(2, 8)).transpose(2, 0, 1))
        assert "has 4 images, but its metadata list 3: only those are read" in caplog.text
        theirs = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
        assert theirs["label"][:] == ["dog", "cat", "dog"]

    def test_splits_have_their_own(self, tmp_path):
        data = tree(tmp_path / "data", train=2, test=2)
        rows = pd.DataFrame({"file_name": ["0.png", "1.png"], "label": ["cat", "dog"]})
        self.describe(data, "csv", rows)
        with pytest.raises(UserError, match=r"metadata\.csv lies above the splits test, train"):
            load(data)
        (data / "metadata.csv").rename(data / "train" / "metadata.csv")
        with pytest.raises(UserError, match="metadata files, but none for its split test"):
            load(data)
        self.describe(data / "test", "csv", rows)
        assert counts(data) == {"train": (2, ["cat", "dog"]), "test": (2, ["cat", "dog"])}

    def test_broken_and_wrong(self, tmp_path):
        data = tree(tmp_path / "data", _here=2)
        for text, message in (
            ("name,label\n0.png,a\n", "file_name"),
            ("file_name,label\n../x.png,a\n", "file_name"),
            ("file_name,label\ngone.png,a\n0.png,b\n", r"gone\.png: No such file"),
        ):
            (data / "metadata.csv").write_text(text)
            with pytest.raises(UserError, match=message):
                load(data)

    def test_parquet_of_that_name_without_images(self, tmp_path):
        write_parquet(tmp_path / "data" / "metadata.parquet", [file_bytes(picture(0))])
        assert len(load(tmp_path / "data")) == 1

    def test_images_beside_parquet_are_told_of(self, tmp_path, caplog):
        data = tree(tmp_path / "data", _here=2)
        write_parquet(data / "train.parquet", [file_bytes(picture(0))] * 3)
        assert len(load(data)) == 3
        assert "holds parquet files and images: the 2 images, 0.png first, are not read" in caplog.text


class TestTables:
    """Labels and parquet files as tools write them."""

    @staticmethod
    def rows(path: Path, labels: list, shade: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = file_bytes(Image.new("RGB", (8, 8), (shade, shade, shade)))
        pd.DataFrame({"image": [image] * len(labels), "label": labels}).to_parquet(path)
        return path

    def test_whole_numbers_as_floats(self, tmp_path, caplog):
        found = load(self.rows(tmp_path / "a.parquet", [0.0, 2.0, 0.0]), require_labels=True)
        assert (found.labels.tolist(), found.class_names) == ([0, 1, 0], ["0", "2"])
        assert load(self.rows(tmp_path / "b.parquet", [0.0, 2.0, None])).labels is None
        assert "1 of 3 rows of b.parquet (train) have no label" in caplog.text

    def test_fractions_are_no_classes(self, tmp_path, caplog):
        file = self.rows(tmp_path / "a.parquet", [0.25, 2.0, 0.5])
        assert load(file).labels is None
        assert "column 'label' of a.parquet (train) holds fractions, not one class per row" in caplog.text
        with pytest.raises(UserError, match="has no labels, which this step needs"):
            load(file, require_labels=True)
        with pytest.raises(UserError, match=r"'label' of .* holds float64, not one class per row"):
            load(file, label_column="label")

    def test_what_names_no_classes_is_told_of(self, tmp_path, caplog):
        for name, labels, kind in (("bytes", [b"a", b"b"], "binary"), ("lists", [[0], [1]], "List")):
            assert load(self.rows(tmp_path / f"{name}.parquet", labels)).labels is None
            assert f"column 'label' of {name}.parquet (train) holds {kind}, not one class per row" in caplog.text

    @pytest.mark.parametrize("test", [[None, None], [float("nan"), float("nan")], [-1, -1]])
    def test_test_split_without_labels(self, tmp_path, test):
        self.rows(tmp_path / "data" / "test.parquet", test)
        self.rows(tmp_path / "data" / "train.parquet", [1, 0, 1])
        assert load(tmp_path / "data", require_labels=True).labels.tolist() == [1, 0, 1]
        assert load(tmp_path / "data", split="test").labels is None

    def test_files_of_a_split_that_differ(self, tmp_path):
        self.rows(tmp_path / "data" / "train-0.parquet", [None, None])
        self.rows(tmp_path / "data" / "train-1.parquet", [1, 0])
        self.rows(tmp_path / "data" / "train-2.parquet", [2.0, None])
        with pytest.raises(UserError, match="3 of 6 rows of data"):
            load(tmp_path / "data", require_labels=True)
        shutil.rmtree(tmp_path / "data")
        self.rows(tmp_path / "data" / "train-0.parquet", [1, 0])
        self.rows(tmp_path / "data" / "train-1.parquet", [2.0, 0.0])
        assert load(tmp_path / "data", require_labels=True).labels.tolist() == [1, 0, 2, 0]

    def test_splits_of_other_types_share_their_classes(self, tmp_path):
        self.rows(tmp_path / "data" / "train.parquet", [0, 1, 2])
        self.rows(tmp_path / "data" / "test.parquet", [2.0, 1.0])
        test = load(tmp_path / "data", split="test")
        assert (test.labels.tolist(), test.class_names) == ([2, 1], ["0", "1", "2"])

    def test_other_content_of_the_same_time(self, tmp_path):
        file = self.rows(tmp_path / "a.parquet", [0, 1], shade=10)
        before, stamp = load(file), file.stat()
        self.rows(file, [1, 0], shade=20)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        after = load(file)
        assert after.fingerprint != before.fingerprint
        assert after.labels.tolist() == [1, 0]
        assert int(after.gather(torch.tensor([0])).max()) == 20


@pytest.mark.parametrize("sides", [(20, 20), (20, 28)], ids=["alike", "of mixed sizes"])
def test_predict_gives_the_accuracy_that_was_measured(tmp_path, capsys, sides):
    """The test images are small and square: what they are stored at depends on the training images."""
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (3, 10, 10, 3))
    for split, count in (("train", 16), ("test", 24)):
        for label, name in enumerate("abc"):
            for number in range(count):
                noise = random.integers(0, 256, (20, 20, 3))
                pixels = 0.2 * np.kron(base[label], np.ones((2, 2, 1))) + 0.8 * noise
                side = sides[number % 2] if split == "train" else 20
                image = Image.fromarray(pixels.astype(np.uint8)).resize((side, side))
                write(tmp_path / "data" / split / name / f"{number}.png", image)
    network = timm.create_model("sssd_resnet18_cifar", num_classes=0, layers=(1, 1, 1, 1))
    save_network(tmp_path / "trunk", network, "sssd_resnet18_cifar", input_size=16)
    run = tmp_path / "run"
    assert sssd("linear", "--data", tmp_path / "data", "--model", tmp_path / "trunk", "--out", run) == 0
    measured = json.loads((run / "metrics.json").read_text())
    for output, accuracy in (("ensemble", measured["ensemble"]), ("2", measured["exits"][1])):
        capsys.readouterr()
        assert sssd("predict", run, tmp_path / "data" / "test", "--format", "jsonl", "--output", output) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        right = [row["class"] == Path(row["image"]).parent.name for row in rows]
        assert len(right) == 72
        assert 100 * sum(right) / len(right) == pytest.approx(accuracy, abs=1e-4)
        assert 40 < accuracy < 99


def test_what_datasets_cannot_read_is_one_line(tmp_path):
    (tmp_path / "header").mkdir()
    (tmp_path / "header" / "metadata.csv").write_text("file_name,label\n")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    for name in ("header", "saved"):
        with pytest.raises(UserError, match=name):
            load(tmp_path / name)


def test_a_folder_whose_name_begins_with_a_tilde(tmp_path, monkeypatch):
    write(tmp_path / "~photos" / "a.png", picture(0))
    monkeypatch.chdir(tmp_path)
    assert len(load("./~photos")) == 1
