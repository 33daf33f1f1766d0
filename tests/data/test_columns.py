"""Which split, which column of images and which labels a table gives, and what it lacks."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.data import load
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "test"}, "has no split 'test': choose one of train"),
            ({"image_column": "img"}, "no column 'img' for image_column: choose one of image, label"),
            ({"image_column": "label"}, "'label' of classes holds int64, not images"),
            ({"label_column": "kind"}, "no column 'kind' for label_column: choose one of image, label"),
            ({"label_column": "image"}, "not one class per row"),
        ],
    )
    def test_options(self, classes, options, message):
        with pytest.raises(UserError, match=message):
            load(classes, **options)

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
