"""Data sets that are objects: the same images and classes as from files, written once."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from helpers.data import everything, load
from sssd_zoo.data.objects import encoded_image, image_files, stored
from sssd_zoo.errors import UserError

CLASSES = ["blue", "green", "red"]


class Items(torch.utils.data.Dataset):
    """The images of a folder of classes, each as `form` makes it of the picture."""

    def __init__(self, root: Path, form, *, labelled: bool = True):
        self.files, self.form, self.labelled = sorted(root.rglob("*.png")), form, labelled
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        image = self.form(self.files[number])
        return (image, self.classes.index(self.files[number].parent.name)) if self.labelled else image


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def tensor(file: Path) -> torch.Tensor:
    return torch.from_numpy(pixels(file).transpose(2, 0, 1).copy())


FORMS = {
    "pictures": lambda file: Image.open(file).convert("RGB"),
    "opened files": Image.open,
    "paths": lambda file: file,
    "bytes of files": lambda file: file.read_bytes(),
    "arrays": pixels,
    "arrays, channels first": lambda file: pixels(file).transpose(2, 0, 1),
    "float arrays": lambda file: pixels(file).astype(np.float32) / 255,
    "tensors": tensor,
    "float tensors": lambda file: tensor(file).float() / 255,
}


def same(one, other):
    assert torch.equal(everything(one)[1], everything(other)[1])
    assert one.class_names == other.class_names
    assert (one.labels is None) == (other.labels is None)
    assert one.labels is None or one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form_are_the_images_and_classes_of_the_folder(form, folder_of_images):
    data = Items(folder_of_images, FORMS[form])
    found = load(stored(data))
    same(found, load(folder_of_images))
    assert found.name.startswith("Items-")
    same(load(stored(Items(folder_of_images, FORMS[form], labelled=False))), load(folder_of_images, unlabelled=True))


def test_the_same_images_are_written_once_and_have_the_same_name(folder_of_images, cache):
    data = Items(folder_of_images, FORMS["tensors"])
    first = Path(stored(data))
    before = (first / "train.parquet").stat()
    assert Path(stored(data)) == first
    assert (first / "train.parquet").stat().st_mtime_ns == before.st_mtime_ns
    assert first.parent == cache
    assert stored(Subset(data, range(40))) != str(first)
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_files_are_not_copied(folder_of_images):
    paths = [str(file) for file in sorted(folder_of_images.rglob("*.png"))]
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    for data in (Items(folder_of_images, Image.open), rows):
        folder = Path(stored(data))
        assert (folder / "train.parquet").stat().st_size < 10_000
        found, files = load(folder), load(folder_of_images)
        assert found.fingerprint == files.fingerprint  # so pseudo labels of the one are those of the other
        assert found.paths()[0] == str(folder_of_images / "blue" / "00.png")


def test_a_picture_that_was_changed_is_not_its_file(folder_of_images):
    def darker(file):
        picture = Image.open(file)
        picture.paste((0, 0, 0), (0, 0, 16, 16))
        return picture

    assert int(everything(load(stored(Items(folder_of_images, darker))))[1].max()) == 0


def test_a_later_frame_of_a_file_is_not_its_first(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])

    def second(file):
        opened = Image.open(tmp_path / "two.tif")
        opened.seek(1)
        return opened

    image = Image.open(io.BytesIO(encoded_image(second(None), 0)["bytes"]))
    assert image.convert("RGB").getpixel((0, 0)) == (0, 128, 0)


class TestDatasets:
    @pytest.fixture
    def rows(self, folder_of_images):
        files = sorted(folder_of_images.rglob("*.png"))
        labels = [CLASSES.index(file.parent.name) for file in files]
        kinds = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSES),
            "note": datasets.Value("string"),
        }
        pictures = [Image.open(file).convert("RGB") for file in files]
        columns = {"image": pictures, "label": labels, "note": [file.name for file in files]}
        return datasets.Dataset.from_dict(columns, datasets.Features(kinds))

    def test_rows_as_they_are(self, rows, folder_of_images):
        same(load(stored(rows)), load(folder_of_images))

    def test_selected_filtered_and_shuffled(self, rows, folder_of_images):
        order = list(range(47, -1, -2))
        found, files = load(stored(rows.select(order))), load(folder_of_images)
        assert torch.equal(everything(found)[1], files.gather(torch.tensor(order)))
        assert found.labels.tolist() == files.labels[order].tolist()

    def test_splits(self, rows):
        both = datasets.DatasetDict(train=rows.select(range(0, 48, 2)), test=rows.select(range(1, 48, 2)))
        folder = stored(both)
        assert [len(load(folder, split=split)) for split in ("train", "test")] == [24, 24]
        same(load(folder, split="test"), load(stored({"test": both["test"]})))

    def test_other_columns_can_be_named(self, rows):
        assert len(load(stored(rows), label_column="note").class_names) == 16

    def test_a_stream_is_refused(self, rows):
        with pytest.raises(UserError, match="IterableDataset, which has no items by number"):
            stored(rows.to_iterable_dataset())


def test_deep_and_many_channels_are_kept():
    deep = np.arange(48, dtype=np.uint16).reshape(4, 4, 3) * 1000
    found = load(stored([deep] * 2), channels=3)
    assert torch.equal(everything(found)[1][0].int(), torch.from_numpy(deep.transpose(2, 0, 1).astype(np.int32)))
    many = torch.arange(5 * 8 * 8, dtype=torch.uint8).reshape(5, 8, 8)
    assert torch.equal(everything(load(stored([many, many]), channels=5))[1][0], many)


@pytest.mark.parametrize(
    ("modes", "back"),
    [(["HSV"], "RGB"), (["YCbCr"], "RGB"), (["RGBA", "RGBa"], "RGBA"), (["LA", "La"], "LA"), (["LA", "PA"], "RGBA")],
)
def test_pictures_in_modes_that_no_file_has(modes, back, folder_of_images):
    picture = Image.open(next(folder_of_images.rglob("*.png"))).convert("RGB")
    for mode in modes:
        picture = picture.convert(mode)
    found = everything(load(stored([picture] * 2)))[1][0].numpy()
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(picture.convert(back).convert("RGB")))


def test_bfloat16():
    values = torch.linspace(0, 1, 8 * 8 * 3).reshape(3, 8, 8)
    found = everything(load(stored([values.bfloat16()] * 2)))[1][0]
    torch.testing.assert_close(found.float(), values * 255, atol=1, rtol=0)


def test_classes_of_a_list_are_numbers_or_text():
    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(4)]
    assert load(stored(list(zip(pictures, (3, 5, 3, 5), strict=True)))).class_names == ["3", "5"]
    assert load(stored(list(zip(pictures, "baba", strict=True)))).labels.tolist() == [1, 0, 1, 0]
    assert load(stored([{"image": picture, "label": torch.tensor(1)} for picture in pictures])).class_names == ["1"]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


RED = Image.new("RGB", (8, 8), (255, 0, 0))
RANDOM = torch.utils.data.Dataset
REFUSED = {
    "is int, which has no items by number": 3,
    "is list_iterator, which has no items by number": iter([RED]),
    "is Stream, which has no items by number": Stream(),
    "of a DataLoader its .dataset": DataLoader([1, 2]),
    "has no items": [],
    "item 0 of the data set has no pixels": [np.zeros((0, 8, 3), np.uint8)],
    "item 0 of the data set is dict_keys, not an image": [{}.keys()],
    "item 0 of the data set has values of the type int64, whose range is not clear: give uint8": [
        torch.randint(0, 256, (3, 8, 8))
    ],
    "values from -2 to 2: give uint8, or floats from 0 to 1": TensorDataset(torch.tensor([[[[-2.0, 2.0]]]])),
    "the class of item 1 of the data set is cat, of another kind": [(RED, 0), (RED, "cat")],
    "the class of item 1 of the data set is None, of another kind": [(RED, 0), RED],
    "the class of item 0 of the data set is dict, and must be one whole number": [(RED, {"boxes": []})],
    "item 0 of the data set has 3 parts": [(RED, 1, 2)],
    "data has the splits first: name them train": {"first": [RED]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_data_set_of_images_is_refused_and_leaves_nothing(message, cache):
    before = set(cache.iterdir()) if cache.is_dir() else set()
    with pytest.raises(UserError) as error:
        stored(REFUSED[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not cache.is_dir() or set(cache.iterdir()) == before


def test_random_augmentation_is_refused(folder_of_images):
    data = Items(folder_of_images, lambda file: tensor(file).float().div(255).mul(torch.rand(())))
    with pytest.raises(UserError, match="another image each time it is read: give it without random augmentation"):
        stored(data)


def test_images_as_files(folder_of_images, tmp_path):
    files = image_files([RED, folder_of_images / "red" / "00.png"], tmp_path)
    assert files == [str(tmp_path / "item 0"), str(folder_of_images / "red" / "00.png")]
    assert np.array_equal(pixels(Path(files[0])), np.asarray(RED))
