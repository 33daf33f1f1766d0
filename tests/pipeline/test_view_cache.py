"""Cached views: what is kept is what the encoder sees of them, resumed and in parts as in one go."""

import errno
import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models with timm
from helpers.commands import one_line, sssd
from sssd_zoo.configs import AnchoredConfig, DataConfig, ForwardConfig
from sssd_zoo.data.augment import normalise, resize, shifted, supervised_view
from sssd_zoo.data.inputs import InputSpec, input_spec
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.views import FEATURES, CachedViewLoader, ViewBatch
from sssd_zoo.errors import UserError
from sssd_zoo.files.json_lines import read_metrics
from sssd_zoo.models.maps import MapShape
from sssd_zoo.models.networks import load_encoder
from sssd_zoo.models.saving import save_network
from sssd_zoo.pipeline import preflight
from sssd_zoo.pipeline.view_cache import write_view_cache
from sssd_zoo.tasks import AnchoredSelfDistillation, FrozenEncoder

SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}
FP32 = ForwardConfig(precision="fp32", device="cpu", batch_size=5)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0, **SMALL).eval()
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 40, 40)}
    return network


@pytest.fixture(scope="module")
def data(folder_of_images):
    return load_images(DataConfig(data=str(folder_of_images), workers=1), default_size=32)


def test_a_cache_that_was_half_replaced_is_written_again(encoder, data, tmp_path, monkeypatch):
    config = AnchoredConfig(anchor=1.0, cached_views=1)
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=4)
    features = (tmp_path / FEATURES).read_bytes()
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        write_view_cache(tmp_path, encoder, data, config, FP32, seed=5)
    monkeypatch.undo()
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=4)
    assert (tmp_path / FEATURES).read_bytes() == features


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("weight", "message"),
    [(1e7, r"features reach .*, and cached views hold at most 65504"), (float("nan"), "hold NaN")],
)
def test_features_that_float16_does_not_hold_are_refused(weight, message, encoder, data, tmp_path):
    network = deepcopy(encoder)
    with torch.no_grad():
        network.layer4[-1].bn2.weight.fill_(weight)
    with pytest.raises(UserError, match=message):
        write_view_cache(tmp_path, network, data, AnchoredConfig(anchor=1.0, cached_views=1), FP32, seed=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_features_are_those_of_the_views(crop, encoder, data, tmp_path):
    config = AnchoredConfig(anchor=1.0, cached_views=3, crop=crop)
    loader = CachedViewLoader(
        tmp_path, lambda: write_view_cache(tmp_path, encoder, data, config, FP32, seed=4), data, batch_size=8, seed=0
    )
    spec = encoder.pretrained_cfg
    seen = []
    for epoch in range(4):
        positions, batch = next(iter(loader.epoch(epoch)))
        view = supervised_view(batch.images, batch.views, 40, crop=crop)
        with torch.inference_mode():
            expected = encoder(normalise(view, spec["mean"], spec["std"]))
        # The encoder saw the view in 8 bits, and its features are kept in 16.
        torch.testing.assert_close(batch.features.float(), expected, atol=0.02, rtol=0.02)
        assert torch.equal(batch.images, data.gather(positions))
        seen.append(dict(zip(positions.tolist(), batch.views.tolist(), strict=True)))
    both = seen[0].keys() & seen[1].keys()
    assert all(seen[0][position] != seen[1][position] for position in both)
    again = seen[0].keys() & seen[3].keys()  # three views: the fourth epoch sees the first one's
    assert all(seen[0][position] == seen[3][position] for position in again)


def test_a_map_is_kept_with_the_features(encoder, data, tmp_path):
    config = AnchoredConfig(anchor=1.0, cached_views=1, dense=True)
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=4, map_shape=MapShape(64, 2))
    kept = np.load(tmp_path / FEATURES)
    write_view_cache(tmp_path / "plain", encoder, data, replace(config, dense=False), FP32, seed=4)
    assert kept.shape == (len(data), 64 + 64 * 4)
    np.testing.assert_array_equal(kept[:, :64], np.load(tmp_path / "plain" / FEATURES))
    places = kept[:, 64:].astype(np.float32).reshape(-1, 64, 2, 2)
    np.testing.assert_allclose(places.mean((2, 3)), kept[:, :64].astype(np.float32), atol=0.01, rtol=0.01)


def test_a_view_of_a_classifier_is_the_same_at_every_size():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = torch.tensor([[-4.0, 2, 32, 32, 0], [3, -1, 32, 32, 1], [0, 0, 32, 32, 0], [4, 4, 32, 32, 1]])
    offsets, flip = torch.tensor([[2, -4], [-1, 3], [0, 0], [4, 4]]), torch.tensor([False, True, False, True])
    whole = shifted(images, offsets, flip, 4).float() / 255
    for size in (16, 32, 48):
        torch.testing.assert_close(supervised_view(images, views, size, crop="pad"), resize(whole, size))
    assert torch.equal(whole[2], images[2].float() / 255)


def test_a_batch_is_cut_as_a_whole_and_moved_but_for_its_views():
    batch = ViewBatch(torch.zeros(5, 3, 8, 8), torch.arange(25.0).view(5, 5), torch.arange(10).view(5, 2).half())
    parts = batch.chunk(2)
    assert [len(part.images) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part.features for part in parts]), batch.features)
    moved = batch.to(torch.device("meta"), non_blocking=True)
    # The host reads the views: on a GPU it would wait for them.
    assert [tensor.device.type for tensor in (moved.images, moved.features, moved.views)] == ["meta", "meta", "cpu"]


def test_the_task_takes_known_features_in_place_of_the_encoder(encoder):
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, **SMALL)
    spec = InputSpec(32, (0.5,) * 3, (0.2,) * 3)
    moments = torch.zeros(64), torch.ones(64)
    config = AnchoredConfig(anchor=2.0)
    task = AnchoredSelfDistillation(
        model, FrozenEncoder(encoder, InputSpec(32, (0.5,) * 3, (0.2,) * 3), *moments), config, spec
    )
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    views = torch.tensor([[0.0, 0, 32, 32, 0]]).expand(6, 5)
    labels = torch.arange(6) % 5
    with torch.no_grad():
        features = encoder(normalise(images.float() / 255, (0.5,) * 3, (0.2,) * 3))
    known = AnchoredSelfDistillation(model, FrozenEncoder(None, spec, *moments), config, spec)
    known.anchor.predictors.load_state_dict(task.anchor.predictors.state_dict())
    batch = known.views(ViewBatch(images, views, features), None)
    expected = task({"images": batch["images"], "encoder": batch["images"], "labels": labels})
    torch.testing.assert_close(known({**batch, "labels": labels})["loss"], expected["loss"])


def test_a_cache_of_the_same_views_is_kept_and_one_of_others_replaced(encoder, data, tmp_path):
    config = AnchoredConfig(anchor=1.0, cached_views=2)
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=0)
    first = np.load(tmp_path / "features.npy")
    assert first.shape == (2 * len(data), 64)
    assert first.dtype == np.float16
    (tmp_path / "features.npy").write_bytes(b"kept")
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=0)
    assert (tmp_path / "features.npy").read_bytes() == b"kept"
    write_view_cache(tmp_path, encoder, data, config, FP32, seed=1)
    assert not np.array_equal(np.load(tmp_path / "features.npy"), first)
    assert json.loads((tmp_path / "views.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("sssd_resnet18", [], id="features"),
        pytest.param(
            "sssd_mobilenetv4_conv_small_cifar", ["--distill.dense", "true"], id="and map", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.long
def test_fit_with_a_public_encoder(model, more, folder_of_images, tmp_path, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_network(folder, timm.create_model("test_resnet", num_classes=0), "test_resnet", input_size=160)
    words = [
        *("fit", "--data", folder_of_images, "--features", folder, "--out", tmp_path / "run", "--baseline", "false"),
        *("--model", model, "--image_size", "32", "--cluster.k", "4", "--distill.cached_views", "2"),
        *("--distill.anchor", "4", "--distill.epochs", "3", "--distill.batch_size", "16", "--log_every", "1"),
        *("--probe.probe_weight_decay", "0.01", "--device", "cpu"),
    ]
    assert sssd(*words, "--teacher_size", "64", *more) == 0
    lines = read_metrics(tmp_path / "run" / "distill" / "metrics.jsonl")
    assert len(lines) == 9
    for loss in ["anchor", "dense"] if more else ["anchor"]:
        assert lines[-1][loss] < lines[0][loss]
    assert not (tmp_path / "run" / "distill" / "view_cache").exists()
    assert "as it is at 64 px" in (tmp_path / "run" / "report.md").read_text()
    capsys.readouterr()
    assert sssd(*words, "--teacher_size", "48", *more) != 0
    assert "teacher_size" in one_line(capsys)


def test_teacher_size_is_refused_where_nothing_would_read_it(folder_of_images, tmp_path, capsys):
    for words in (
        ("fit", "--data", folder_of_images, "--teacher_size", "64", "--out", tmp_path / "a"),
        ("distill", "--data", folder_of_images, "--labels", "random", "--teacher_size", "64", "--out", tmp_path / "b"),
    ):
        assert sssd(*words) != 0
        assert "--teacher_size needs --" in one_line(capsys)


def test_an_encoder_that_cannot_take_the_size_is_refused_in_one_line(folder_of_images, tmp_path, capsys):
    folder = tmp_path / "encoder"
    folder.mkdir()
    save_network(folder, timm.create_model("test_vit", num_classes=0), "test_vit", input_size=160)
    words = ("fit", "--data", folder_of_images, "--features", folder, "--out", tmp_path / "run")
    assert sssd(*words, "--teacher_size", "50") != 0  # patches of 16 px
    assert "cannot take images of 50 px" in one_line(capsys)
    network = load_encoder(str(folder), 64)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    assert input_spec(network).size == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--distill.dense", "true"], "--distill.dense is of the anchor's network: give --distill.anchor too"),
        (
            ["--distill.dense", "true", "--method", "anchored"],
            "distill: dense needs feature maps of at least 2 x 2 positions, and the student has one at 32 px: give "
            "larger views",
        ),
        (
            [*("--distill.dense", "true", "--method", "anchored", "--image_size", "64"), "--distill.sizes", "[32, 64]"],
            "the student has one at 32 px: give larger views",
        ),
    ],
)
def test_maps_that_cannot_be_learnt_are_told_before_anything_is_trained(
    changes, message, folder_of_images, tmp_path, capsys
):
    words = ["fit", "--data", folder_of_images, "--out", tmp_path / "run", "--model", "sssd_resnet18"]
    assert sssd(*words, *([] if "--image_size" in changes else ["--image_size", "32"]), *changes) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_views_that_do_not_fit_on_the_disk_are_told_before_anything_is_trained(
    folder_of_images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400_000))
    words = [
        "fit",
        "--data",
        folder_of_images,
        "--model",
        "sssd_resnet18",
        "--image_size",
        "32",
        "--method",
        "anchored",
    ]
    # 48 images, 512 features of 2 bytes each: 49,152 bytes for every view
    assert sssd(*words, "--out", tmp_path / "run", "--distill.cached_views", "9") == 2
    assert "cached_views 9 needs 0.0 GB, and" in one_line(capsys)
    assert not (tmp_path / "run").exists()
    preflight.check_space(tmp_path / "run", AnchoredConfig(cached_views=8), images=48, numbers=512)


@pytest.mark.long
def test_distill_learns_the_map_and_resumes(folder_of_images, tmp_path, capsys):
    torch.manual_seed(0)
    save_network(tmp_path / "encoder", timm.create_model("test_resnet", num_classes=0), "test_resnet", input_size=64)
    words = [
        *(
            "distill",
            "--data",
            folder_of_images,
            "--labels",
            "true",
            "--encoder",
            tmp_path / "encoder",
            "--dense",
            "true",
        ),
        *("--model", "sssd_mobilenetv3_small_100_cifar", "--image_size", "32", "--batch_size", "24", "--device", "cpu"),
        *("--out", tmp_path / "run", "--epochs", "1", "--log_every", "1"),
    ]
    assert sssd(*words) == 0
    assert all(line["dense"] > 0 for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert sssd(*words, "--resume") == 0
    capsys.readouterr()
    assert sssd(*words, "--resume", "--dense", "false") == 2
    assert "dense" in one_line(capsys), "another training"
