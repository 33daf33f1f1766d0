"""Which folders are classes, and which are splits."""

import pytest

from helpers.data import load
from helpers.images import picture, write
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import split_names


@pytest.mark.parametrize("nested", ["photos", "photos/2024/may"])
def test_one_folder_is_no_class(tmp_path, nested):
    write(tmp_path / nested / "one.png", picture(0))
    assert load(tmp_path).labels is None


def test_images_beside_class_folders(classes):
    write(classes / "stray.png", picture(99))
    data = load(classes)
    assert len(data) == 10
    assert data.labels is None


def test_files_named_like_splits_stay_together(tmp_path):
    for name in ("a_test_1.png", "train_2.png", "val.png"):
        write(tmp_path / name, picture(0))
    assert split_names(DataConfig(data=str(tmp_path))) == ["train"]
    assert len(load(tmp_path)) == 3


def test_split_folders_number_their_classes_alike(tmp_path):
    for place in ("train/cat", "train/dog", "train/eel", "val/cat", "val/eel"):
        write(tmp_path / place / "0.png", picture(0))
    train, validation = load(tmp_path), load(tmp_path, split="val")
    assert train.labels.tolist() == [0, 1, 2]
    assert (validation.split, validation.labels.tolist()) == ("validation", [0, 2])
    assert load(tmp_path, split="validation").fingerprint == validation.fingerprint


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        write(tmp_path / name / "0.png", picture(0))
    assert load(tmp_path).class_names == ["bus", "car", "train"]
