"""Which file each pseudo label is of: the paths in labels.parquet, where the images are files."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.commands import sssd
from helpers.data import load
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.data.loading import relative_path
from sssd_zoo.labels.pseudo_labels import PseudoLabels
from sssd_zoo.pipeline.publish_labels import leave_out_paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "photos"
    for number in range(8):
        write(root / ("a" if number % 2 else "b") / f"{number} é.png", picture(number))
    (root / "a" / "3 é.png").write_text("not an image")
    return root


def cluster(data, out):
    words = ["--model", "sssd_resnet18_cifar", "--k", "3", "--max_corrupt", "1", "--device", "cpu", "--unlabelled"]
    assert sssd("pseudo-label", "--data", data, "--out", out, *words) == 0
    return PseudoLabels.load(out)


def test_paths_are_relative_to_the_folder_and_their_rows_are_the_datas(photos, tmp_path, monkeypatch):
    labels = cluster(photos, tmp_path / "labels")
    expected = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    assert labels.paths == [path for path in expected if path != "a/3 é.png"]
    assert labels.rows.tolist() == [row for row, path in enumerate(expected) if path != "a/3 é.png"]
    monkeypatch.chdir(photos.parent)
    relative = cluster("photos", tmp_path / "again")
    assert relative.paths == labels.paths
    assert relative.meta["fingerprint"] == labels.meta["fingerprint"]
    table = pq.read_table(tmp_path / "labels" / "labels.parquet")
    assert table.column_names == ["row", "label", "distance", "path"]

    leave_out_paths(tmp_path / "labels" / "labels.parquet")
    table = pq.read_table(tmp_path / "labels" / "labels.parquet")
    assert table.column_names == ["row", "label", "distance"]


def test_labels_without_paths_load(photos, tmp_path):
    labels = cluster(photos, tmp_path / "labels")
    PseudoLabels(**{**vars(labels), "paths": None}).save(tmp_path / "labels")
    old = PseudoLabels.load(tmp_path / "labels")
    assert old.paths is None
    assert np.array_equal(old.labels_of(labels.rows), labels.labels)


def test_rows_of_parquet_have_none(tmp_path):
    data = write_parquet(tmp_path / "train.parquet", [file_bytes(picture(number)) for number in range(4)])
    assert load(data).paths() == [None] * 4


def test_files_elsewhere_keep_their_path():
    assert relative_path("photos/a/1.png", [Path("photos"), Path("/photos")]) == "a/1.png"
    assert relative_path("/photos/a/1.png", [Path("photos"), Path("/photos")]) == "a/1.png"
    assert relative_path("/others/1.png", [Path("photos"), Path("/photos")]) == "/others/1.png"


def test_a_part_of_a_split_has_the_paths_of_its_rows(photos):
    part = load(photos, split="train[5:]", unlabelled=True)
    assert part.paths() == [f"b/{number} é.png" for number in (2, 4, 6)]
    assert part.paths(np.array([2, 0])) == ["b/6 é.png", "b/2 é.png"]
