"""Detection: reading boxes, average precision against slow manual versions, what of a trunk moves, and the commands."""

import json
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import sssd_zoo  # noqa: F401
from helpers.commands import ROOT, command, one_line, sssd
from helpers.commands import TINY_DETECTION as TINY
from helpers.images import CLASSES, draw, file_bytes, write_parquet, write_voc
from helpers.networks import save_tiny
from sssd_zoo.configs import DetectionDataConfig, DetectorConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.detection import DetectionBatch, load_detection
from sssd_zoo.detection import detector as detection
from sssd_zoo.detection.average_precision import coco_average_precision, voc_average_precision
from sssd_zoo.detection.detector import build_detector, load_detector, save_detector, stage_modules
from sssd_zoo.errors import UserError
from sssd_zoo.pipeline import detect_eval
from sssd_zoo.pipeline.detect import load_test_data
from sssd_zoo.tasks.detection import Detection, flip_boxes

BCCD = ROOT.parent / "shared" / "data" / "bccd"


def write_coco(root: Path, numbers: range) -> Path:
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number in numbers:
        pixels, objects = draw(number)
        Image.fromarray(pixels).save(root / "train" / f"{number}.jpg", quality=95)
        images.append({"id": 100 + number, "file_name": f"{number}.jpg"})
        for name, (left, top, right, bottom), crowd in objects:
            box = [left, top, right - left, bottom - top]
            category = 7 + 2 * CLASSES.index(name)
            annotations.append({"image_id": 100 + number, "category_id": category, "bbox": box, "iscrowd": int(crowd)})
    categories = [{"id": 7 + 2 * place, "name": name} for place, name in enumerate(CLASSES)]
    file = root / "annotations" / "instances_train.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def write_without_objects(root: Path) -> Path:
    file = write_coco(root, range(2))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    return file


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("data") / "VOC", {"trainval": range(6), "test": range(6, 9)})


def read(*data, **arguments):
    return load_detection(DetectionDataConfig(data=list(map(str, data)), workers=0, **arguments))


def same(one, other):
    assert one.class_names == other.class_names
    assert len(one) == len(other)
    for mine, theirs in zip(one.targets, other.targets, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("boxes", "labels", "difficult"))


class TestReading:
    def test_voc_gives_what_was_drawn(self, voc):
        data = read(voc)
        assert data.class_names == list(CLASSES)
        ((index, batch),) = data.batches([torch.tensor([3, 0])])
        assert index.tolist() == [3, 0]
        for number, image, target in zip((3, 0), batch.images, batch.targets, strict=True):
            pixels, objects = draw(number)
            assert image.shape == (3, *pixels.shape[:2])
            assert target["boxes"].tolist() == [list(map(float, box)) for _, box, _ in objects]
            assert [data.class_names[label - 1] for label in target["labels"]] == [name for name, _, _ in objects]
            assert target["difficult"].tolist() == [difficult for _, _, difficult in objects]

    def test_coco_and_datasets_give_the_same(self, voc, tmp_path):
        from datasets import ClassLabel, Dataset, Features, List, Value
        from datasets import Image as ImageFeature

        same(read(voc), read(write_coco(tmp_path / "coco", range(6))))
        rows = {"image": [str(voc / "JPEGImages" / f"{number:06}.jpg") for number in range(6)], "objects": []}
        for number in range(6):
            objects = draw(number)[1]
            rows["objects"].append(
                [
                    {"bbox": [a, b, c - a, d - b], "category": CLASSES.index(name), "difficult": difficult}
                    for name, (a, b, c, d), difficult in objects
                ]
            )
        things = {
            "bbox": List(Value("float32")),
            "category": ClassLabel(names=list(CLASSES)),
            "difficult": Value("bool"),
        }
        features = Features(image=ImageFeature(), objects=List(things))
        Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        same(read(voc), read(tmp_path / "saved"))
        # The other way round: an object of lists, of corners, with the classes' names as text.
        features = Features(
            image=ImageFeature(), boxes={"bbox": List(List(Value("int64"))), "label": List(Value("string"))}
        )
        names = [
            {"bbox": [box for _, box, _ in draw(number)[1]], "label": [name for name, _, _ in draw(number)[1]]}
            for number in range(3)
        ]
        Dataset.from_dict({"image": rows["image"][:3], "boxes": names}, features=features).save_to_disk(
            tmp_path / "other"
        )
        other = read(tmp_path / "other", objects_column="boxes", box_format="xyxy")
        for mine, theirs in zip(read(voc).targets, other.targets, strict=False):
            assert torch.equal(mine["boxes"], theirs["boxes"])
            assert torch.equal(mine["labels"], theirs["labels"])
        with pytest.raises(UserError, match=r"no column 'objects'.*image, boxes"):
            read(tmp_path / "other")

    def test_roots_and_splits_are_joined(self, voc, tmp_path):
        again = write_voc(tmp_path / "VOC2", {"trainval": range(2), "test": range(3)})
        assert len(read(voc, split="trainval+test")) == 9
        assert len(read(voc, again)) == 8
        assert read(voc).fingerprint != read(voc, again).fingerprint
        with pytest.raises(UserError, match="no split 'val': ImageSets/Main has test, trainval"):
            read(voc, split="val")

    def test_bad_things_are_named_counted_and_a_number_decides(self, tmp_path, caplog):
        root = write_voc(tmp_path / "VOC", {"trainval": range(5)})
        (root / "JPEGImages/000000.jpg").unlink()
        (root / "Annotations/000001.xml").write_text("<annotation>")
        corners = "<xmin>5</xmin><ymin>5</ymin><xmax>5</xmax><ymax>9</ymax>"
        flat = f"<object><name>disc</name><bndbox>{corners}</bndbox></object>"
        outside = flat.replace(">5<", ">500<").replace(">9<", ">600<").replace("<xmax>500", "<xmax>600")
        empty = flat.replace("<xmin>5</xmin>", "")
        (root / "Annotations/000002.xml").write_text(f"<annotation>{flat}{outside}{empty}</annotation>")
        with pytest.raises(UserError, match="5 images or objects") as error:
            read(root)
        for named in ("000000", "000001", "000002: a box of 'disc' without area, (5.0, 5.0, 5.0, 9.0)", "max_bad 0"):
            assert named in str(error.value)
        with caplog.at_level(logging.WARNING, "sssd_zoo"):
            data = read(root, max_bad=5)
        assert len(data.bad) == 5
        assert "left out 5" in caplog.text
        assert data.names == ["000002", "000003", "000004"]
        assert data.targets[0]["boxes"].shape == (0, 4)
        with pytest.raises(UserError, match=r"unknown class 'square'"):
            read(root, max_bad=5, classes=["disc"])

    def test_a_picture_that_ends_early_stops_the_run_with_its_name(self, tmp_path):
        root = write_voc(tmp_path / "VOC", {"trainval": range(2)})
        file = root / "JPEGImages/000001.jpg"
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(UserError, match="000001"):
            list(read(root).batches([torch.arange(2)]))

    def test_chunks_are_those_of_a_tensor(self):
        for count, parts in ((4, 2), (5, 2), (7, 3), (2, 2)):
            batch = DetectionBatch([torch.full((3, 1, 1), i) for i in range(count)], [{}] * count)
            mine = [[int(image[0]) for image in part.images] for part in batch.chunk(parts)]
            assert mine == [part.tolist() for part in torch.arange(count).chunk(parts)]

    @pytest.mark.skipif(not BCCD.exists(), reason="BCCD is not on this machine")
    def test_bccd(self):
        with pytest.raises(UserError, match=r"2 images or objects.*BloodImage_00338.*without area"):
            read(BCCD)
        data = read(BCCD, max_bad=2)
        assert data.class_names == ["Platelets", "RBC", "WBC"]
        assert len(data) == 292


def random_detections(seed, images=6, classes=2):
    """Predictions near and off the truth, with difficult objects; scores of few digits, so that some tie."""
    random = torch.Generator().manual_seed(seed)
    predictions, targets = [], []
    for _ in range(images):
        count = int(torch.randint(0, 5, (1,), generator=random))
        corner = torch.rand(count, 2, generator=random) * 60
        truth = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=random)], 1)
        labels = torch.randint(1, classes + 1, (count,), generator=random)
        copies = torch.cat([truth, truth, truth]) + 6 * torch.randn(3 * count, 4, generator=random)
        copies[:, 2:] = torch.maximum(copies[:, 2:], copies[:, :2] + 1)
        answer = torch.where(torch.rand(3 * count, generator=random) < 0.8, labels.repeat(3), 1)
        scores = (torch.rand(3 * count, generator=random) * 50).round() / 50
        predictions.append({"boxes": copies, "scores": scores, "labels": answer})
        targets.append({"boxes": truth, "labels": labels, "difficult": torch.rand(count, generator=random) < 0.25})
    return predictions, targets


def slow_voc(predictions, targets, label, iou):
    """The development kit's rule, detection by detection, with overlaps counted by hand."""
    everything = []
    for image, prediction in enumerate(predictions):
        order = sorted(range(len(prediction["scores"])), key=lambda i: -float(prediction["scores"][i]))
        for i in order:
            if prediction["labels"][i] == label:
                everything.append((float(prediction["scores"][i]), image, prediction["boxes"][i].tolist()))
    everything.sort(key=lambda item: -item[0])
    positives = sum(
        1 for t in targets for i in range(len(t["labels"])) if t["labels"][i] == label and not t["difficult"][i]
    )
    found, rights, wrongs, curve = set(), 0, 0, []
    for _, image, (left, top, right, bottom) in everything:
        best, match = -1.0, None
        for i, (a, b, c, d) in enumerate(targets[image]["boxes"].tolist()):
            if targets[image]["labels"][i] != label:
                continue
            inside = max(0, min(right, c) - max(left, a)) * max(0, min(bottom, d) - max(top, b))
            overlap = inside / ((right - left) * (bottom - top) + (c - a) * (d - b) - inside)
            if overlap > best:
                best, match = overlap, i
        if best >= iou and targets[image]["difficult"][match]:
            pass  # neither right nor wrong
        elif best >= iou and (image, match) not in found:
            found.add((image, match))
            rights += 1
        else:
            wrongs += 1
        if rights + wrongs:
            curve.append((rights / positives, rights / (rights + wrongs)) if positives else (0, 0))
    best_from = [max((p for r, p in curve if r >= tenth / 10), default=0.0) for tenth in range(11)]
    return 100 * sum(best_from) / 11, positives


class TestAveragePrecision:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("iou", [0.5, 0.75])
    def test_voc_against_a_slow_version(self, seed, iou):
        predictions, targets = random_detections(seed)
        fast = voc_average_precision(predictions, targets, 2, iou=iou)
        for label in (1, 2):
            slow, positives = slow_voc(predictions, targets, label, iou)
            assert (label in fast) == (positives > 0)
            if positives:
                assert fast[label] == pytest.approx(slow)

    def test_the_truth_is_perfect_and_difficult_objects_do_not_count(self):
        _, targets = random_detections(3)
        perfect = [
            {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.full((len(t["labels"]),), 0.9)}
            for t in targets
        ]
        easy = [
            {name: value[~t["difficult"]] for name, value in p.items()} for p, t in zip(perfect, targets, strict=True)
        ]
        assert any(bool(t["difficult"].any()) for t in targets)
        for answers in (perfect, easy):
            assert set(voc_average_precision(answers, targets, 2).values()) == {100.0}
            found = coco_average_precision(answers, targets, CLASSES)
            assert found["ap"] == found["ap50"] == found["ap75"] == pytest.approx(100)

    def test_a_wrong_first_answer_by_hand(self):
        # One object, a wrong box at 0.9 and the right one at 0.5: precision 1/2 at every recall.
        predictions = [
            {
                "boxes": torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]),
                "scores": torch.tensor([0.9, 0.5]),
                "labels": torch.tensor([1, 1]),
            }
        ]
        targets = [
            {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1]), "difficult": torch.tensor([False])}
        ]
        assert voc_average_precision(predictions, targets, 2) == {1: pytest.approx(50)}
        found = coco_average_precision(predictions, targets, CLASSES)
        assert found["ap50"] == pytest.approx(50)
        assert found["ap_per_class"] == {"disc": pytest.approx(50)}
        targets[0]["difficult"][0] = True
        with pytest.raises(UserError, match="no object to find"):
            coco_average_precision(predictions, targets, CLASSES)


def tiny_task(frozen_stages=0, batchnorm="train", model="sssd_resnet18"):
    torch.manual_seed(0)
    # Else the last BatchNorm of each block begins at 0, and what is before it has no gradient in the first step.
    body = timm.create_model(model, features_only=True, zero_init_last=False)
    config = DetectorConfig(model=model, short_side=64, fpn_channels=16, regions=16, anchor_scale=4)
    detector = build_detector(body, 2, config)
    return Detection(detector, size=64, frozen=stage_modules(body, frozen_stages), batchnorm=batchnorm)


class TestTask:
    @pytest.mark.parametrize("batchnorm", ["train", "eval", "frozen"])
    @pytest.mark.parametrize("frozen_stages", [0, 2])
    def test_what_moves(self, voc, batchnorm, frozen_stages):
        task = tiny_task(frozen_stages, batchnorm).train()
        before = {name: value.clone() for name, value in task.state_dict().items()}
        optimiser = torch.optim.SGD(task.parameter_groups()[0]["params"], lr=0.01)
        ((_, batch),) = read(voc).batches([torch.tensor([1, 3])])
        task(task.views(batch, BatchRandom(0, 0)))["loss"].backward()
        optimiser.step()
        body = "detector.backbone.body."
        for name, value in task.state_dict().items():
            if not name.startswith(body):
                continue
            part = name.removeprefix(body)
            still = frozen_stages == 2 and part.startswith(("conv1.", "bn1.", "layer1."))
            norm = "bn" in part or "downsample.1" in part
            statistic = "running" in part or "num_batches" in part
            if statistic:
                moves = batchnorm == "train" and not still
            elif norm:
                moves = batchnorm != "frozen" and not still
            else:
                moves = not still
            assert torch.equal(before[name], value) != moves, name

    def test_stages_of_other_networks(self):
        body = timm.create_model("sssd_resnet18", features_only=True)
        assert stage_modules(body, 1) == ["conv1", "bn1", "act1"]
        assert stage_modules(body, 2)[-1] == "layer1"
        body = timm.create_model("convnext_atto", features_only=True)
        assert stage_modules(body, 1) == ["stem_0", "stem_1", "stages_0"]
        with pytest.raises(UserError, match="from 0 to 4"):
            stage_modules(body, 5)
        body = timm.create_model("sssd_regnety_004_cifar", features_only=True, device="meta")
        assert stage_modules(body, 1) == ["model.stem"]
        assert stage_modules(body, 2) == ["model.stem", "model.s1"]
        assert set(stage_modules(body, 5)) <= {name for name, _ in body.named_modules()}

    def test_difficult_objects_take_no_part_and_flips_keep_boxes_on_their_objects(self, voc):
        task = tiny_task()
        ((_, batch),) = read(voc).batches([torch.tensor([3, 0, 1, 2])])
        widths = [image.shape[-1] for image in batch.images]
        views = task.views(batch, BatchRandom(0, 1))
        assert len(views["targets"][0]["boxes"]) == len(batch.targets[0]["boxes"]) - 1
        flipped = 0
        for image, stored, target, width in zip(views["images"], batch.images, views["targets"], widths, strict=True):
            flipped += not torch.equal(image, stored / 255)
            for (left, top, right, bottom), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
                inside = image[:, top + 2 : bottom - 2, left + 2 : right - 2].mean((1, 2))
                assert int(inside.argmax()) == (0 if label == 1 else 2)
                assert 0 <= left < right <= width
        assert 0 < flipped < 4
        boxes = torch.tensor([[1.0, 2, 5, 6]])
        assert flip_boxes(boxes, 20).tolist() == [[15, 2, 19, 6]]
        assert torch.equal(flip_boxes(flip_boxes(boxes, 20), 20), boxes)

    def test_the_same_step_draws_the_same_whatever_the_global_generator(self, voc):
        task = tiny_task(batchnorm="frozen").train()
        ((_, batch),) = read(voc).batches([torch.tensor([0, 1])])
        losses = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            losses.append(task(task.views(batch, BatchRandom(0, 3)))["loss"].item())
            assert torch.equal(state, torch.get_rng_state())
        assert losses[0] == losses[1]

    def test_progressive_sizes_last_for_a_step(self, voc):
        task, sizes = tiny_task().train(), []
        task.detector.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(min(inputs[0].shape[2:])))
        ((_, batch),) = read(voc).batches([torch.tensor([0, 1])])
        for task.size in (32, 96):
            task(task.views(batch, BatchRandom(0, 0)))
        task.eval().detector([torch.zeros(3, 90, 60)])
        assert sizes == [32, 96, 64]
        assert task.detector.transform.min_size == (64,)

    def test_an_image_without_objects_trains(self):
        task = tiny_task().train()
        empty = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.long),
            "difficult": torch.zeros(0, dtype=torch.bool),
        }
        batch = DetectionBatch([torch.zeros(3, 40, 60, dtype=torch.uint8)] * 2, [empty, empty])
        assert task(task.views(batch, BatchRandom(0, 0)))["loss"].isfinite()


@pytest.mark.parametrize("width", [100, 101])
def test_an_image_whose_short_side_would_vanish_is_told_before(width, tmp_path):
    Image.new("RGB", (width, 1)).save(tmp_path / "line.png")
    content = {
        "images": [{"id": 1, "file_name": "line.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 1]}],
        "categories": [{"id": 1, "name": "line"}],
    }
    (tmp_path / "lines.json").write_text(json.dumps(content))
    data = read(tmp_path / "lines.json")
    if width > 100:
        with pytest.raises(UserError, match=r"1 images of lines\.json \(line\.png\) are less than 1 px"):
            data.check(100, "trained on")
        return
    data.check(100, "trained on")
    task = tiny_task().train()
    task.detector.transform.max_size = 100
    ((_, batch),) = data.batches([torch.tensor([0])])
    assert task(task.views(batch, BatchRandom(0, 0)))["loss"].isfinite()


def to_measure_on(*data, test_data=None, test_split=None, **arguments):
    """The training images and those that `sssd detect` measures on."""
    config = DetectionDataConfig(data=list(map(str, data)), workers=0, **arguments)
    train = load_detection(config)
    test_data = None if test_data is None else list(map(str, test_data))
    return train, load_test_data(config, test_data, test_split, train)


@pytest.fixture(scope="module")
def untested(tmp_path_factory):
    """A tree as VOC2012 has it: lists `train`, `val` and, of both, `trainval`."""
    root = write_voc(tmp_path_factory.mktemp("data") / "VOC2012", {"train": range(4), "val": range(4, 6)})
    names = "".join(f"{number:06}\n" for number in range(6))
    (root / "ImageSets/Main/trainval.txt").write_text(names)
    return root


class TestTestData:
    """What `sssd detect` measures on: never images that it trained on."""

    def test_the_default_is_the_first_split_without_training_images(self, voc, untested):
        assert to_measure_on(voc)[1].names == [f"{number:06}" for number in (6, 7, 8)]
        assert to_measure_on(untested, split="train")[1].names == ["000004", "000005"]
        (untested / "ImageSets/Main/test.txt").write_text("000000\n")
        try:
            assert to_measure_on(untested, split="train")[1].names == ["000004", "000005"]
        finally:
            (untested / "ImageSets/Main/test.txt").unlink()

    @pytest.mark.parametrize("split", [None, "trainval", "train+val", "val"])
    def test_no_split_is_left(self, untested, split):
        message = (
            r"^2 of 2 images of VOC2012 \(val\) are trained on too \(000004, 000005\): .*--test_split or --test_data"
        )
        with pytest.raises(UserError, match=message):
            to_measure_on(untested, split=split)

    def test_the_only_split_of_datasets(self, tmp_path):
        from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
        from datasets import Image as ImageFeature

        things = {"bbox": List(Value("float32")), "category": ClassLabel(names=["disc"])}
        rows = [
            {"image": Image.new("RGB", (60, 40), (i, 0, 0)), "objects": [{"bbox": [5, 5, 20, 20], "category": 0}]}
            for i in range(4)
        ]
        saved = Dataset.from_list(rows, features=Features(image=ImageFeature(), objects=List(things)))
        DatasetDict(validation=saved).save_to_disk(tmp_path / "one")
        DatasetDict(train=saved.select([0, 1]), validation=saved.select([2, 3])).save_to_disk(tmp_path / "two")
        with pytest.raises(UserError, match=r"^4 of 4 images of one \(validation\) are trained on too"):
            to_measure_on(tmp_path / "one")
        assert to_measure_on(tmp_path / "two")[1].names == ["validation 0", "validation 1"]
        with pytest.raises(
            UserError, match=r"^2 of 4 images of two \(train\+validation\) are trained on too \(train 0,"
        ):
            to_measure_on(tmp_path / "two", test_split="train+validation")
        with pytest.raises(UserError, match=r"^2 of 2 images of two \(train\)"):
            to_measure_on(tmp_path / "two", test_data=[tmp_path / "one" / ".." / "two"], test_split="train")
        shutil.copytree(tmp_path / "two", tmp_path / "copy")
        with pytest.raises(UserError, match=r"^2 of 2 images of copy \(train\) are trained on too"):
            to_measure_on(tmp_path / "two", test_data=[tmp_path / "copy"], test_split="train")
        with pytest.raises(UserError, match=r"^2 images or objects .*train 0: it is listed twice"):
            read(tmp_path / "two", tmp_path / "copy")
        assert len(read(tmp_path / "two", tmp_path / "copy", max_bad=2)) == 2

    def test_rows_of_two_sources_may_be_the_same_files(self, tmp_path):
        for split, numbers in (("train", (0, 1)), ("test", (2, 3))):
            (tmp_path / "data" / split).mkdir(parents=True)
            lines = []
            for number in numbers:
                pixels, objects = draw(number)
                Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
                things = [{"bbox": list(box), "category": name} for name, box, _ in objects]
                lines.append(json.dumps({"file_name": f"{number}.png", "objects": things}) + "\n")
            (tmp_path / "data" / split / "metadata.jsonl").write_text("".join(lines))
        assert to_measure_on(tmp_path / "data", box_format="xyxy")[1].names == ["test 0", "test 1"]
        with pytest.raises(UserError, match=r"^2 of 2 images of train are trained on too"):
            to_measure_on(tmp_path / "data", test_data=[tmp_path / "data" / "train"], box_format="xyxy")

    def test_what_is_asked_for_shares_files_under_other_names(self, voc, tmp_path):
        with pytest.raises(UserError, match=r"^6 of 9 images of VOC"):
            to_measure_on(voc, test_split="trainval+test")
        (tmp_path / "linked").symlink_to(voc)
        with pytest.raises(UserError, match=r"^6 of 6 images of VOC"):
            to_measure_on(voc, test_data=[tmp_path / "linked"], test_split="trainval")
        file = write_coco(tmp_path / "coco", range(4))
        content = json.loads(file.read_text())
        other = {**content, "images": content["images"][3:], "annotations": content["annotations"][-2:]}
        (file.parent / "other.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"^1 of 1 images of other\.json are trained on too \(3\.jpg\)"):
            to_measure_on(file, test_data=[file.parent / "other.json"], image_folder=str(tmp_path / "coco/train"))

    def test_a_coco_file_alone_is_not_measured_and_another_is(self, voc, tmp_path):
        file = write_coco(tmp_path / "coco", range(3))
        assert to_measure_on(file)[1] is None
        assert len(to_measure_on(file, test_data=[voc])[1]) == 3

    def test_a_coco_file_has_no_splits(self, voc, tmp_path):
        file = write_coco(tmp_path / "coco", range(3))
        for options in ({"split": "val"}, {"test_split": "val"}):
            with pytest.raises(UserError, match="COCO files have no splits, so none is called val: give the file"):
                to_measure_on(file, **options)
        assert len(to_measure_on(voc, test_data=[file], split="trainval")[1]) == 3, "that is a split of the VOC tree"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    body = timm.create_model("test_resnet", features_only=True)
    config = DetectorConfig(model="test_resnet", short_side=64, long_side=80, fpn_channels=16, anchor_scale=4)
    folder = tmp_path_factory.mktemp("detector")
    save_detector(folder, build_detector(body, 2, config), config, CLASSES)
    return folder


class TestEvaluation:
    """`sssd detect-eval` of a detector that has learnt nothing."""

    @pytest.fixture
    def measured(self, monkeypatch):
        """The transform and the images that are measured with, of each call; none is run."""
        calls = []

        def measure(detector, data, *_, **__):
            calls.append((detector.transform, data))
            return {"ap_per_class": {}}

        monkeypatch.setattr(detect_eval, "measure_detector", measure)
        return calls

    def test_any_split(self, untrained, voc, measured):
        words = ["detect-eval", untrained, "--data", f"[{voc}]", "--workers", "0"]
        for more in ([], ["--split", "trainval"], ["--split", "trainval+test"]):
            assert sssd(*words, *more) == 0
        assert [len(data) for _, data in measured] == [3, 6, 9]

    def test_coco_files_are_measured_beside_a_split(self, untrained, voc, measured, tmp_path):
        file = write_coco(tmp_path / "coco", range(9, 13))
        assert sssd("detect-eval", untrained, "--data", f"[{file},{voc}]", "--workers", "0") == 0
        assert [len(data) for _, data in measured] == [4 + 3]

    def test_what_may_be_trained_on_is_not_the_default(self, untrained, measured, tmp_path, capsys):
        tree = write_voc(tmp_path / "tree", {"trainval": range(4)})
        file = write_coco(tmp_path / "coco", range(9, 13))
        for data in (f"[{tree}]", f"[{file},{tree}]"):
            words = ["detect-eval", untrained, "--data", data, "--workers", "0"]
            assert sssd(*words) == 2
            assert f"{tree}: no split 'test' or 'val' to measure on: give another by --split" in one_line(capsys)
            assert sssd(*words, "--split", "trainval") == 0
        assert [len(data) for _, data in measured] == [4, 4 + 4]

    def test_the_only_split_is_measured(self, untrained, measured, tmp_path, capsys):
        from datasets import Dataset, DatasetDict

        objects = {"bbox": [[5, 5, 20, 20]], "category": ["disc"]}
        one = write_parquet(tmp_path / "one.parquet", [file_bytes(Image.new("RGB", (60, 40)))], objects=[objects])
        rows = Dataset.from_parquet(str(one), cache_dir=str(tmp_path / "cache"))
        DatasetDict(train=rows, extra=rows).save_to_disk(tmp_path / "two")
        assert sssd("detect-eval", untrained, "--data", f"[{one}]", "--workers", "0") == 0
        assert sssd("detect-eval", untrained, "--data", f"[{tmp_path / 'two'}]", "--workers", "0") == 2
        assert "no split 'test' or 'val'" in one_line(capsys)
        assert [len(data) for _, data in measured] == [1]

    def test_the_long_side_keeps_its_ratio(self, untrained, voc, measured):
        for more in ([], ["--short_side", "128"]):
            assert sssd("detect-eval", untrained, "--data", f"[{voc}]", "--workers", "0", *more) == 0
        sizes = [(transform.min_size, transform.max_size) for transform, _ in measured]
        assert sizes == [((64,), 80), ((128,), 160)]

    def test_classes_are_the_detectors(self, untrained, voc, measured, capsys):
        words = ["detect-eval", untrained, "--data", f"[{voc}]", "--workers", "0", "--classes"]
        assert sssd(*words, "[square, ' disc']") == 0
        for classes in ("[zebra, lion]", "[disc]", "[disc, square, lion]"):
            assert sssd(*words, classes) == 2
            assert "are not the classes of the detector, disc, square: remove --classes" in one_line(capsys)
        assert len(measured) == 1


@contextmanager
def interrupted(monkeypatch, at: int):
    """Within the block, the user presses Ctrl-C when the training asks for its `at`-th batch."""
    batches, count = detection.DetectionData.batches, 0

    def stop(self, order):
        nonlocal count
        for pair in batches(self, order):
            count += 1
            if count == at:
                raise KeyboardInterrupt
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(detection.DetectionData, "batches", stop)
        yield


class TestCommands:
    @pytest.mark.slow
    def test_a_stopped_run_goes_on_to_equal_weights_and_is_measured(self, voc, tmp_path, capsys, monkeypatch):
        # The smallest network that timm has, as checkpoints are written at every step.
        words = ["detect", "--data", f"[{voc}]", "--model", "test_resnet", "--pretrained", "false", *TINY]
        words += ["--checkpoint_every", "1"]
        assert sssd(*words, "--out", tmp_path / "whole", "--voc") == 0
        out = capsys.readouterr().out
        assert "AP75" in out
        assert "VOC2007 AP50" in out

        with interrupted(monkeypatch, at=5):
            assert sssd(*words, "--out", tmp_path / "stopped") == 130
        assert not (tmp_path / "stopped/model.safetensors").exists()
        assert sssd(*words, "--out", tmp_path / "stopped") == 2
        assert "--resume" in one_line(capsys)
        assert sssd(*words, "--out", tmp_path / "stopped", "--resume", "--batchnorm", "eval") == 2
        assert "batchnorm: 'train' there, 'eval' now" in one_line(capsys)
        assert sssd(*words, "--out", tmp_path / "stopped", "--resume") == 0
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
        assert weights[0] == weights[1]
        metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
        assert 0 <= metrics["ap"] <= metrics["ap50"] <= 100
        assert set(metrics["voc_ap50_per_class"]) == set(CLASSES)
        assert Image.open(tmp_path / "whole/detections.png").size[0] > 600

        done = command(
            *("eval/detect.py", "--model", str(tmp_path / "whole"), "--data", f"[{voc}]", "--workers", "0", "--voc"),
            *("--device", "cpu", "--out", str(tmp_path / "eval")),
        )
        assert done.returncode == 0, done.stderr
        again = json.loads((tmp_path / "eval/metrics.json").read_text())
        for name in ("ap", "ap50", "ap75", "voc_ap50"):
            assert again[name] == pytest.approx(metrics[name], abs=1e-3)

    @pytest.mark.slow
    def test_two_processes_train_and_one_measures(self, voc, tmp_path):
        words = ["train/detect.py", "--data", f"[{voc}]", "--model", "test_resnet", "--pretrained", "false", *TINY]
        words += ["--batch_size", "4", "--frozen_stages", "1", "--out", str(tmp_path / "two")]
        done = command("-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", *words)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "two/metrics.json").read_text())
        assert metrics["machine"]["processes"] == 2
        assert metrics["ap"] >= 0

    @pytest.mark.long
    def test_trunks_of_runs_and_of_timm(self, voc, tmp_path, capsys):
        from sssd_zoo.models.saving import save_network

        network = timm.create_model("sssd_resnet18", num_classes=3)
        save_network(tmp_path / "run", network, "sssd_resnet18", input_size=64)
        words = ["detect", "--data", f"[{voc}]", *TINY, "--epochs", "1", "--lr", "0", "--batchnorm", "frozen"]
        assert sssd(*words, "--model", tmp_path / "run", "--out", tmp_path / "ours", "--frozen_stages", "2") == 0
        trunk = network.state_dict()
        found = {
            name.removeprefix("backbone.body."): value
            for name, value in load_file(tmp_path / "ours/model.safetensors").items()
            if name.startswith("backbone.body.")
        }
        assert found.keys() == {name for name in trunk if not name.startswith(("exit", "fc."))}
        assert all(torch.equal(value, trunk[name]) for name, value in found.items())
        detector, classes = load_detector(tmp_path / "ours")
        assert classes == list(CLASSES)
        assert not detector.training
        words[-1] = "eval"
        assert sssd(*words, "--model", "resnet18", "--pretrained", "false", "--out", tmp_path / "timm") == 0
        assert json.loads((tmp_path / "timm/detector.json").read_text())["architecture"] == "resnet18"
        # VGG's classifier, which a detector leaves out, is larger than the detector.
        assert sssd(*words, "--model", "vgg11_bn", "--pretrained", "false", "--out", tmp_path / "vgg") == 0
        assert load_detector(tmp_path / "vgg")[1] == list(CLASSES)
        capsys.readouterr()

    @pytest.mark.long
    def test_a_training_goes_on_with_the_same_weights_wherever_they_lie(self, voc, tmp_path, capsys, monkeypatch):
        save_tiny(tmp_path / "run", 3)
        words = ["detect", "--data", f"[{voc}]", *TINY, "--epochs", "1", "--checkpoint_every", "1", "--resume"]
        words += ["--out", tmp_path / "out", "--model"]
        with interrupted(monkeypatch, at=2):
            assert sssd(*words, tmp_path / "run") == 130
        (tmp_path / "run").rename(tmp_path / "moved")
        save_tiny(tmp_path / "run", 3)
        assert sssd(*words, tmp_path / "run") == 2
        assert "it was written by another run (model: " in one_line(capsys)
        assert sssd(*words, tmp_path / "moved") == 0

    @pytest.mark.parametrize(
        ("mistake", "message"),
        [
            (("--model", "sssd_resnet34"), "No pretrained weights"),
            (("--model", "nothing"), "no model of that name"),
            (("--model", "vit_tiny_patch16_224", "--pretrained", "false"), "take a convolutional network"),
            (("--model", "resnet18", "--pretrained", "false", "--frozen_stages", "9"), "from 0 to 5"),
            (("--model", "resnet18", "--pretrained", "false", "--test_split", "val"), "no split 'val'"),
            (("--model", "resnet18", "--pretrained", "false", "--test_split", "trainval"), "6 of 6 images of VOC"),
            (("--model", "resnet18", "--pretrained", "false", "--batch_size", "64"), "larger than the data set"),
            (("--model", "resnet18", "--pretrained", "false", "--data", "[{empty}]"), "nothing can be trained on it"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
    )
    def test_mistakes(self, mistake, message, voc, tmp_path, capsys):
        empty = write_without_objects(tmp_path / "empty")
        mistake = [word.format(empty=empty) for word in mistake]
        assert sssd("detect", "--data", f"[{voc}]", *TINY, "--out", tmp_path / "out", *mistake) == 2
        assert message in one_line(capsys)
        assert not (tmp_path / "out").exists()

    def test_neither_a_detector_nor_data(self, voc, tmp_path, capsys):
        assert sssd("detect-eval", "--model", tmp_path, "--data", f"[{voc}]") == 2
        assert "holds no detector" in one_line(capsys)
        assert sssd("detect", "--data", f"[{tmp_path / 'none'}]", "--model", "resnet18", "--out", tmp_path / "o") == 2
        assert "no file or folder" in one_line(capsys)
