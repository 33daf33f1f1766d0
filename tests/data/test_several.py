"""Several folders as one data set, and lists of files."""

import shutil

import pytest
import torch

from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig, SettingsError
from sssd_zoo.data.loading import load_images, split_names
from sssd_zoo.data.several import open_data
from sssd_zoo.data.sources import short_name
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError


def load(*data, **settings):
    return load_images(DataConfig(data=[str(each) for each in data], **settings), progress=False)


@pytest.fixture
def folders(tmp_path):
    """Two folders with class sub-folders: cats and dogs, and dogs and owls, four images each."""
    seed = 0
    for folder, classes in (("a", ("cat", "dog")), ("b", ("dog", "owl"))):
        for name in classes:
            for number in range(4):
                write(tmp_path / folder / name / f"{number}.png", picture(seed))
                seed += 1
    return tmp_path / "a", tmp_path / "b"


class TestSeveral:
    def test_rows_and_classes_of_both(self, folders):
        a, b = folders
        both, first, second = load(a, b), load(a), load(b)
        assert both.class_names == ["cat", "dog", "owl"]
        assert both.labels.tolist() == [0] * 4 + [1] * 8 + [2] * 4
        every = torch.cat([each.gather(torch.arange(8)) for each in (first, second)])
        assert torch.equal(both.gather(torch.arange(16)), every)
        assert both.name == "a + b"
        assert both.fingerprint not in (first.fingerprint, second.fingerprint)

    def test_one_in_a_list_is_what_it_is_alone(self, folders):
        alone = load_images(DataConfig(data=str(folders[0])), progress=False)
        assert load(folders[0]).fingerprint == alone.fingerprint
        assert load(folders[0]).name == alone.name == "a"

    def test_splits_come_together(self, folders, tmp_path):
        write(tmp_path / "c" / "train" / "owl" / "x.png", picture(90))
        write(tmp_path / "c" / "test" / "owl" / "y.png", picture(91))
        write(tmp_path / "c" / "test" / "cat" / "z.png", picture(92))
        names = DataConfig(data=[str(folders[0]), str(tmp_path / "c")], unlabelled=True)
        assert split_names(names) == ["train", "test"]
        assert len(load_images(names, progress=False)) == 9

    def test_a_class_has_the_same_number_in_every_split(self, folders, tmp_path):
        write(tmp_path / "c" / "train" / "ant" / "w.png", picture(90))
        write(tmp_path / "c" / "train" / "owl" / "x.png", picture(91))
        write(tmp_path / "c" / "test" / "ant" / "y.png", picture(92))
        write(tmp_path / "c" / "test" / "owl" / "z.png", picture(93))
        splits = open_data(DataConfig(data=[str(folders[0]), str(tmp_path / "c")]), progress=False)
        classes = ["ant", "cat", "dog", "owl"]
        assert {name: rows.features["label"].names for name, rows in splits.items()} == {
            "train": classes,
            "test": classes,
        }
        assert splits["train"]["label"][:] == [1] * 4 + [2] * 4 + [0, 3]
        assert splits["test"]["label"][:] == [0, 3]

    def test_labels_need_to_be_those_of_all(self, folders, tmp_path, caplog):
        write(tmp_path / "flat" / "0.png", picture(99))
        data = load(*folders, tmp_path / "flat")
        assert data.labels is None
        assert len(data) == 17
        assert "labels (train) are not used, as flat has none" in caplog.text

    def test_folders_and_parquet(self, folders, tmp_path):
        pictures = [file_bytes(picture(seed)) for seed in (50, 51)]
        parquet = write_parquet(tmp_path / "more.parquet", pictures, label=["dog", "eel"])
        data = load(folders[0], parquet)
        assert data.class_names == ["cat", "dog", "eel"]
        assert data.labels.tolist() == [0] * 4 + [1] * 5 + [2]

    def test_a_file_in_both_is_read_once(self, folders, caplog):
        a, _ = folders
        inner = a / "dog"
        data = load(a, inner, unlabelled=True)
        assert len(data) == 8
        assert "4 files (train) lie in several of a and dog" in caplog.text
        assert data.fingerprint == load(a).fingerprint

    def test_copies_are_told_with_their_names(self, folders, caplog):
        a, b = folders
        shutil.copy(a / "cat" / "1.png", b / "owl" / "copy.png")
        write(b / "owl" / "alike.bmp", picture(77))
        write(a / "dog" / "alike.bmp", picture(78))  # as long, and different
        data = load(a, b)
        assert len(data) == 19
        assert f"1 images (train) lie in several of a and b under different names ({a}/cat/1.png = {b}" in caplog.text

    def test_a_stream_of_both(self, folders):
        settings = DataConfig(data=[str(each) for each in folders], streaming=True)
        data = load_streaming(settings, progress=False)
        _, images = next(data.batches(16, seed=0, epoch=0))
        every = torch.cat([load(each).gather(torch.arange(8)) for each in folders])
        assert {image.numpy().tobytes() for image in images} == {image.numpy().tobytes() for image in every}

    @pytest.mark.parametrize("data", [["", "b"], ["nowhere/at/all", "b"]])
    def test_one_that_is_not_there(self, data):
        with pytest.raises((UserError, SettingsError)):
            load(*data)

    def test_names_say_nothing_of_other_folders(self, tmp_path):
        assert short_name(["org/name", str(tmp_path)]) == f"name + {tmp_path.name}"


class TestLists:
    def test_paths_relative_to_the_list_in_its_order(self, folders, tmp_path):
        a, b = folders
        (tmp_path / "mine.txt").write_text(f"b/owl/0.png\n\n{a}/cat/2.png\n", encoding="utf-8")
        data = load_images(DataConfig(data=str(tmp_path / "mine.txt")), progress=False)
        assert torch.equal(
            data.gather(torch.arange(2)),
            torch.cat([load(b).gather(torch.tensor([4])), load(a).gather(torch.tensor([2]))]),
        )
        assert data.labels is None

    def test_a_folder_stands_for_its_images_and_the_name_for_a_split(self, folders, tmp_path):
        (tmp_path / "train.txt").write_text("\ufeffa\nb/owl\n", encoding="utf-8")
        (tmp_path / "val.txt").write_text("b/dog/0.png\n", encoding="utf-8")
        lists = [str(tmp_path / "train.txt"), str(tmp_path / "val.txt")]
        assert split_names(DataConfig(data=lists)) == ["train", "validation"]
        assert len(load(*lists)) == 12
        assert len(load(*lists, split="val")) == 1

    def test_what_is_named_twice_is_read_once(self, folders, tmp_path, caplog):
        (tmp_path / "link.png").symlink_to(tmp_path / "a/cat/0.png")
        (tmp_path / "mine.txt").write_text("a/cat/0.png\na/cat/1.png\na/cat/0.png\nlink.png\n", encoding="utf-8")
        assert len(load(tmp_path / "mine.txt")) == 2
        assert "names 2 images more than once" in caplog.text

    def test_missing_files_are_named(self, folders, tmp_path):
        (tmp_path / "mine.txt").write_text("a/cat/0.png\nb/nothing.png\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"1 image of mine\.txt.*nothing\.png: No such file"):
            load(tmp_path / "mine.txt")
        assert len(load(tmp_path / "mine.txt", max_corrupt=1)) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"\n \n", "names no images"), (b"\xff\xfe\x00", "not in UTF-8"), (b"a\0b\n", "NUL character")],
    )
    def test_what_is_no_list(self, tmp_path, content, message):
        (tmp_path / "mine.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(tmp_path / "mine.txt")
