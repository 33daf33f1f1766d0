"""Detection data as people have them: names, encodings, ids, sizes and boxes that are not what they should be."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from helpers.commands import one_line, sssd
from sssd_zoo.configs import DetectionDataConfig
from sssd_zoo.data.detection import DetectionData, load_detection
from sssd_zoo.errors import UserError

WIDTH, HEIGHT = 60, 40
BOX = [5, 6, 20, 10]  # xywh


def read(*data: Path, **arguments) -> DetectionData:
    return load_detection(DetectionDataConfig(data=list(map(str, data)), workers=0, **arguments))


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int | None = None) -> Path:
    """An image that is black but for a red patch in its stored top left corner."""
    image = Image.new("RGB", size)
    image.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}))
    return path


def annotation(
    name: str = "thing", size: tuple[int, int] | None = None, difficult: str = "0", filename: str = ""
) -> str:
    left, top, width, height = BOX
    corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + width}</xmax><ymax>{top + height}</ymax>"
    stated = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    thing = f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"
    return f"<annotation><filename>{filename}</filename>{stated}{thing}</annotation>"


def voc(root: Path, names: list[str], listed: str | bytes | None = None) -> Path:
    """A VOC tree of these images, and a list of them."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(), encoding="utf-8")
    text = "".join(f"{name}\n" for name in names) if listed is None else listed
    data = text if isinstance(text, bytes) else text.encode()
    (root / "ImageSets/Main/trainval.txt").write_bytes(data)
    return root


def coco(file: Path, images=None, annotations=None, categories=None, encoding: str = "utf-8") -> Path:
    """A COCO file, by default of one image with one box; images that it names are made where they are not there."""
    images = [{"id": 1, "file_name": "a.png"}] if images is None else images
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX}] if annotations is None else annotations
    categories = [{"id": 1, "name": "thing"}] if categories is None else categories
    for image in images:
        path = file.parent / str(image["file_name"]).replace("\\", "/")
        if not path.exists():
            picture(path)
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    return file


class TestVocLists:
    @pytest.mark.parametrize(
        ("names", "listed"),
        [
            ([f"photo {i}" for i in range(-1, 9)], None),  # not ten times "photo"
            (["a b", "a b c", "x"], "a b  1\na b c -1\nx  0\n"),
            (["my photo", "one  two"], "my photo\none  two\n"),
            (["000001", "000002", "000003"], "000001  1\n000002 -1\n000003  0\n"),
            (["000001", "000002"], "000001\r\n\r\n  \r\n000002\r\n"),
            (["büro", "naïve"], "büro\nnaïve\n".encode("utf-8-sig")),
            (["büro", "naïve"], "büro\nnaïve\n".encode("latin-1")),
            (["büro", "5 € note"], "büro\n5 € note\n".encode("cp1252")),
            (["büro", "naïve"], "büro  1\nnaïve -1\n".encode("utf-16")),
            (["bu\u0308ro"], "b\u00fcro\n"),  # decomposed on the disk, as from a Mac, composed in the list
            (["b\u00fcro"], "bu\u0308ro\n"),
            (["a.b", "a.c"], None),
        ],
    )
    def test_every_image_once(self, tmp_path, names, listed):
        data = read(voc(tmp_path, names, listed))
        assert len(data) == len(names)
        assert len({image.image for image in data._images}) == len(names)
        assert all(target["boxes"].tolist() == [[5, 6, 25, 16]] for target in data.targets)
        assert sum(len(batch.images) for _, batch in data.batches([torch.arange(len(data))])) == len(names)

    @pytest.mark.parametrize(
        ("listed", "split"), [("a\nb\na\n", None), ("a 1\na -1\nb 1\n", None), ("a\nb\n", "trainval+other")]
    )
    def test_an_image_listed_twice_counts_once(self, tmp_path, listed, split):
        root = voc(tmp_path, ["a", "b"], listed)
        (root / "ImageSets/Main/other.txt").write_text("b\n")
        with pytest.raises(UserError, match=r"1 images or objects.*twice"):
            read(root, split=split)
        assert sorted(read(root, split=split, max_bad=1).names) == ["a", "b"]

    def test_a_split_named_twice(self, tmp_path):
        with pytest.raises(UserError, match="twice"):
            read(voc(tmp_path, ["a"]), split="trainval+trainval")

    def test_other_images_of_the_same_names_and_sizes(self, tmp_path):
        before = read(voc(tmp_path / "data", ["a"])).fingerprint
        assert read(tmp_path / "data").fingerprint == before
        Image.new("RGB", (40, 24)).save(tmp_path / "data" / "JPEGImages" / "a.jpg")
        assert read(tmp_path / "data").fingerprint != before

    def test_one_file_in_two_sources_counts_once(self, tmp_path):
        with pytest.raises(UserError, match="twice"):
            read(voc(tmp_path, ["a"]), tmp_path)


class TestVocAnnotations:
    @pytest.mark.parametrize(
        ("head", "encoding"),
        [
            ('<?xml version="1.0" encoding="iso-8859-1"?>', "latin-1"),
            ("", "latin-1"),  # which XML is not without saying so
            ('<?xml version="1.0" encoding="utf-8"?>', "cp1252"),  # a lie
            ('<?xml version="1.0" encoding="utf-8"?>', "utf-8-sig"),
            ('<?xml version="1.0" encoding="utf-16"?>', "utf-16"),
            ('<?xml version="1.0" encoding="unheard-of"?>', "utf-8"),
        ],
    )
    def test_encodings(self, tmp_path, head, encoding):
        root = voc(tmp_path, ["a"])
        (root / "Annotations/a.xml").write_bytes((head + annotation("bücher")).encode(encoding))
        assert read(root).class_names == ["bücher"]

    @pytest.mark.parametrize(
        ("text", "difficult"), [("1", True), (" 1 ", True), ("True", True), ("0", False), ("", False), ("false", False)]
    )
    def test_difficult(self, tmp_path, text, difficult):
        root = voc(tmp_path, ["a"])
        (root / "Annotations/a.xml").write_text(annotation(difficult=text))
        assert read(root).targets[0]["difficult"].tolist() == [difficult]

    @pytest.mark.parametrize("name", ["a.JPG", "a.png", "a.jpeg", "a.TIFF"])
    def test_images_of_any_ending(self, tmp_path, name):
        root = voc(tmp_path, ["a"])
        (root / "JPEGImages/a.jpg").unlink()
        picture(root / "JPEGImages" / name)
        assert len(read(root)) == 1

    @pytest.mark.parametrize("filename", ["b.png", "C:\\photos\\b.png", "../../elsewhere/b.png", "/nowhere/b.png"])
    def test_the_file_name_in_an_annotation_stays_in_the_folder(self, tmp_path, filename):
        root = voc(tmp_path / "VOC", ["a"])
        (root / "JPEGImages/a.jpg").unlink()
        picture(tmp_path / "elsewhere/b.png", (10, 10))
        (root / "Annotations/a.xml").write_text(annotation(filename=filename))
        with pytest.raises(UserError, match="a: No such file"):
            read(root)
        picture(root / "JPEGImages/b.png")
        assert read(root)._images[0].image == root / "JPEGImages/b.png"

    def test_class_names_in_either_unicode_are_one(self, tmp_path):
        root = voc(tmp_path, ["a", "b"])
        (root / "Annotations/a.xml").write_text(annotation("b\u00fcro"), encoding="utf-8")
        (root / "Annotations/b.xml").write_text(annotation(" bu\u0308ro "), encoding="utf-8")
        assert read(root).class_names == ["b\u00fcro"]
        assert len(read(root, classes=["bu\u0308ro"])) == 2

    def test_a_line_that_is_no_name(self, tmp_path):
        root = voc(tmp_path, ["a"], "a\n" + 400 * "x" + "\nnul\0\n../a\n")
        with pytest.raises(UserError, match="3 images"):
            read(root)


class TestSizes:
    """A picture that EXIF turns is stored as 60 x 40, and 40 x 60 as it is looked at."""

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    @pytest.mark.parametrize("kind", ["voc", "coco", "datasets"])
    def test_boxes_are_of_the_picture_whose_size_is_stated(self, tmp_path, orientation, kind):
        for turned, size in ((False, (WIDTH, HEIGHT)), (True, (HEIGHT, WIDTH))):
            root = tmp_path / str(turned)
            # A box that only the turned picture has room for is cut by the stored one.
            box = [5, 6, 20, 50] if turned else [5, 6, 50, 20]
            data = self.write(kind, root, size, orientation, box)
            ((_, batch),) = data.batches([torch.tensor([0])])
            assert tuple(batch.images[0].shape[1:]) == size[::-1]
            assert data.targets[0]["boxes"].tolist() == [[5, 6, 5 + box[2], 6 + box[3]]]
            upright = Image.open(self.file)
            upright.load()
            if turned:
                from PIL import ImageOps

                upright = ImageOps.exif_transpose(upright)
            np.testing.assert_array_equal(batch.images[0].numpy(), np.asarray(upright).transpose(2, 0, 1))

    def write(self, kind: str, root: Path, size, orientation: int, box: list[int]) -> DetectionData:
        if kind == "voc":
            voc(root, ["a"])
            self.file = picture(root / "JPEGImages/a.jpg", orientation=orientation)
            text = annotation(size=size).replace("<xmax>25", f"<xmax>{5 + box[2]}")
            (root / "Annotations/a.xml").write_text(text.replace("<ymax>16", f"<ymax>{6 + box[3]}"))
            return read(root)
        self.file = picture(root / "a.jpg", orientation=orientation)
        if kind == "coco":
            image = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
            things = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}]
            return read(coco(root / "a.json", images=[image], annotations=things))
        features = Features(
            image=ImageFeature(),
            width=Value("int64"),
            height=Value("int64"),
            objects=List({"bbox": List(Value("int64")), "category": ClassLabel(names=["thing"])}),
        )
        rows = {"image": [str(self.file)], "width": [size[0]], "height": [size[1]]}
        rows["objects"] = [[{"bbox": box, "category": 0}]]
        Dataset.from_dict(rows, features=features).save_to_disk(root / "saved")
        return read(root / "saved")

    @pytest.mark.parametrize("orientation", [None, 1, 6])
    def test_another_size_is_named(self, tmp_path, orientation):
        picture(tmp_path / "a.jpg", orientation=orientation)
        image = {"id": 1, "file_name": "a.jpg", "width": 120, "height": 80}
        with pytest.raises(UserError, match=r"a\.jpg: its annotation states 120 x 80 pixels, the image has 60 x 40"):
            read(coco(tmp_path / "a.json", images=[image]))

    @pytest.mark.parametrize("size", [(0, 0), (None, None), ("", "x"), (-1, 40), (float("inf"), float("nan"))])
    def test_no_size_is_no_other_size(self, tmp_path, size):
        image = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
        assert read(coco(tmp_path / "a.json", images=[image])).targets[0]["boxes"].tolist() == [[5, 6, 25, 16]]

    def test_a_half_turn_is_as_the_others_of_the_data_are_and_said(self, tmp_path, caplog):
        picture(tmp_path / "a.jpg", orientation=6)
        picture(tmp_path / "b.jpg", orientation=3)
        images = [
            {"id": 1, "file_name": "a.jpg", "width": HEIGHT, "height": WIDTH},
            {"id": 2, "file_name": "b.jpg", "width": WIDTH, "height": HEIGHT},
        ]
        things = [{"id": i, "image_id": i, "category_id": 1, "bbox": BOX} for i in (1, 2)]
        with caplog.at_level(logging.WARNING, "sssd_zoo"):
            both = read(coco(tmp_path / "both.json", images=images, annotations=things))
            alone = read(coco(tmp_path / "alone.json", images=images[1:], annotations=things[1:]))
        assert "refer to the rotated one" in caplog.text
        assert "refer to the stored one" in caplog.text
        red = [next(data.batches([torch.tensor([len(data) - 1])]))[1].images[0][0] for data in (both, alone)]
        assert red[0][-4:, -8:].min() > 200
        assert red[1][:4, :8].min() > 200

    def test_damaged_exif_is_no_reason(self, tmp_path):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
        assert len(read(coco(tmp_path / "a.json", images=[{"id": 1, "file_name": "a.jpg"}]))) == 1

    def test_too_many_pixels(self, tmp_path):
        file = coco(tmp_path / "a.json")
        assert len(read(file, max_pixels=WIDTH * HEIGHT)) == 1
        with pytest.raises(UserError, match=r"60 x 40 pixels are more than --max_pixels 2399"):
            read(file, max_pixels=WIDTH * HEIGHT - 1)


class TestCoco:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    def test_encodings(self, tmp_path, encoding):
        file = coco(tmp_path / "a.json", categories=[{"id": 1, "name": "büro"}], encoding=encoding)
        assert read(file).class_names == ["büro"]

    @pytest.mark.parametrize("ids", [(1, 1), (1, "1")])
    def test_two_images_of_one_id(self, tmp_path, ids):
        images = [{"id": number, "file_name": f"{place}.png"} for place, number in enumerate(ids)]
        with pytest.raises(UserError, match=r"two entries with id 1, 0\.png and 1\.png"):
            read(coco(tmp_path / "a.json", images=images))

    def test_two_categories_of_one_id(self, tmp_path):
        categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
        with pytest.raises(UserError, match="two entries with id 1, cat and dog"):
            read(coco(tmp_path / "a.json", categories=categories))

    @pytest.mark.parametrize("ids", [(1, 1), (1, 2)])
    def test_one_image_twice(self, tmp_path, ids):
        file = coco(tmp_path / "a.json", images=[{"id": number, "file_name": "a.png"} for number in ids])
        with pytest.raises(UserError, match=r"1 images or objects.*twice"):
            read(file)
        data = read(file, max_bad=1)
        assert data.names == ["a.png"]
        assert len(data.targets[0]["boxes"]) == 1

    def test_ids_may_be_text(self, tmp_path):
        things = [{"id": "x", "image_id": "1", "category_id": "1", "bbox": BOX}]
        assert len(read(coco(tmp_path / "a.json", annotations=things)).targets[0]["boxes"]) == 1

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            ({"bbox": None}, "it has no box"),
            ({"bbox": []}, "it has no box"),
            ({"bbox": [1, 2, 3]}, "not four numbers"),
            ({"bbox": ["a", 2, 3, 4]}, "not four numbers"),
            ({"bbox": {"x": 1}}, "not four numbers"),
            ({"bbox": 7}, "not four numbers"),
            ({"bbox": [5, 6, float("nan"), 10]}, "without area"),
            ({"bbox": [5, 6, float("inf"), 10]}, "without area"),
            ({"bbox": [25, 6, -20, 10]}, "without area"),
            ({"bbox": [5, 6, 0, 10]}, "without area"),
            ({"bbox": [500, 6, 20, 10]}, "without area"),
            ({"bbox": [20, 6, 1e-6, 10]}, "without area"),  # in float32 its corners are one
            ({"category_id": 0}, "no category 0"),
            ({"category_id": None}, "no category None"),
            ({"image_id": 9}, "no image 9"),
        ],
    )
    def test_one_annotation_that_cannot_be_used(self, tmp_path, wrong, reason):
        good = {"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX}
        bad = {**good, "id": 2, **wrong}
        if wrong.get("bbox", BOX) is None:
            del bad["bbox"]
        # Names that are numbers must not take in what has an unknown category.
        categories = [{"id": 1, "name": "0"}, {"id": 2, "name": "None"}]
        file = coco(tmp_path / "a.json", annotations=[good, bad], categories=categories)
        with pytest.raises(UserError, match=f"1 images or objects.*{reason}"):
            read(file)
        assert read(file, max_bad=1).targets[0]["boxes"].tolist() == [[5, 6, 25, 16]]

    @pytest.mark.parametrize(
        ("crowd", "difficult"), [(0, False), ("0", False), (None, False), (1, True), ("1", True), (True, True)]
    )
    def test_crowds(self, tmp_path, crowd, difficult):
        things = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": BOX, "iscrowd": crowd}]
        data = read(coco(tmp_path / "a.json", annotations=things))
        assert data.targets[0]["difficult"].tolist() == [difficult]
        with pytest.raises(UserError, match="no object to find") if difficult else nullcontext():
            data.check(200, "measured on")

    def test_file_names(self, tmp_path):
        outside = picture(tmp_path / "elsewhere" / "c.png")
        images = [
            {"id": 1, "file_name": "some folder\\a b.png"},
            {"id": 2, "file_name": "../elsewhere/c.png"},
            {"id": 3, "file_name": str(picture(tmp_path / "d.png"))},
        ]
        (tmp_path / "coco").mkdir()
        file = coco(tmp_path / "coco" / "a.json", images=images)
        assert len(read(file)) == 3
        outside.unlink()
        with pytest.raises(UserError, match=r"1 images.*\.\./elsewhere/c\.png: No such file"):
            read(file)

    @pytest.mark.parametrize("name", ["a\0b.png", "a\ud800b.png", "x" * 5000], ids=["null", "surrogate", "long"])
    def test_names_that_no_file_can_have(self, tmp_path, name, caplog):
        images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "other.png"}]
        file = coco(tmp_path / "a.json", images=images)
        file.write_text(file.read_text().replace('"other.png"', json.dumps(name)))
        with pytest.raises(UserError, match=r"^1 images or objects of a\.json cannot be used"):
            read(file)
        with caplog.at_level(logging.CRITICAL, "sssd_zoo"):  # xdist cannot send half a surrogate pair
            assert len(read(file, max_bad=1)) == 1

    def test_the_folder_is_the_one_with_most_of_the_images(self, tmp_path):
        (tmp_path / "annotations").mkdir()
        (tmp_path / "train").mkdir()
        images = [{"id": number, "file_name": f"{number}.png"} for number in range(1, 4)]
        file = coco(tmp_path / "annotations" / "instances_train.json", images=images)
        for number in (2, 3):
            (file.parent / f"{number}.png").rename(tmp_path / "train" / f"{number}.png")
        (file.parent / "1.png").unlink()
        with pytest.raises(UserError, match=r"1 images or objects.*1\.png: No such file"):
            read(file)

    @pytest.mark.parametrize(
        "text", ["", "{", "[1, 2]", '{"images": 3}', '{"images": [], "annotations": [], "categories": [1]}']
    )
    def test_other_files(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            read(tmp_path / "a.json")

    def test_parts_of_the_image_for_pixels(self, tmp_path):
        things = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4]}]
        with pytest.raises(UserError, match="give them in pixels"):
            read(coco(tmp_path / "a.json", annotations=things))

    def test_boxes_that_are_cut_are_counted(self, tmp_path, caplog):
        things = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [50, 6, 10 + i, 10]} for i in (0, 1, 30)]
        with caplog.at_level(logging.WARNING, "sssd_zoo"):
            read(coco(tmp_path / "a.json", annotations=things))
        assert "clipped 1 boxes" in caplog.text

    def test_the_command_says_it_in_one_line(self, tmp_path, capsys):
        images = [{"id": 1, "file_name": f"{place}.png"} for place in range(2)]
        file = coco(tmp_path / "a.json", images=images)
        words = ["detect", "--data", f"[{file}]", "--model", "resnet18", "--pretrained", "false"]
        assert sssd(*words, "--out", tmp_path / "out") == 2
        assert "two entries with id 1" in one_line(capsys)
        assert not (tmp_path / "out").exists()


class TestDatasets:
    def save(self, root: Path, objects: list, things) -> Path:
        images = [str(picture(root / f"{row}.png")) for row in range(len(objects))]
        features = Features(image=ImageFeature(), objects=things)
        Dataset.from_dict({"image": images, "objects": objects}, features=features).save_to_disk(root / "saved")
        return root / "saved"

    def test_rows_without_objects_and_objects_without_boxes(self, tmp_path):
        things = List({"bbox": List(Value("float64")), "category": ClassLabel(names=["a", "b"])})
        rows = [
            None,
            [],
            [{"bbox": BOX, "category": 1}],
            [{"bbox": None, "category": 1}, {"bbox": [1.0], "category": 0}],
        ]
        rows += [[{"bbox": BOX, "category": None}], [{"bbox": BOX, "category": -1}]]
        saved = self.save(tmp_path, rows, things)
        with pytest.raises(
            UserError, match=r"4 images or objects.*train 3: an object has no box.*train 4.*unknown class"
        ):
            read(saved)
        data = read(saved, max_bad=4)
        assert [len(target["boxes"]) for target in data.targets] == [0, 0, 1, 0, 0, 0]

    def test_lists_of_different_lengths(self, tmp_path):
        things = {"bbox": List(List(Value("float64"))), "category": List(Value("string"))}
        rows = [{"bbox": [BOX], "category": ["a"]}, {"bbox": [BOX, BOX], "category": ["a"]}]
        saved = self.save(tmp_path, rows, things)
        with pytest.raises(UserError, match="train 1: its lists of objects are of different lengths"):
            read(saved)
        assert read(saved, max_bad=1).names == ["train 0"]
