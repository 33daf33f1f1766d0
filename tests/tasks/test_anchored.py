"""Anchored self distillation against a slow manual version, and what of it may move."""

import pytest
import timm
import torch
import torch.nn.functional as F

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.configs import AnchoredConfig, SelfDistillationConfig, SettingsError
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.models.maps import MapShape
from sssd_zoo.models.multi_exit import classifiers
from sssd_zoo.tasks import AnchoredClusterFit, AnchoredSelfDistillation, FrozenEncoder, SelfDistillation
from sssd_zoo.tasks.anchored import anchor_loss, dense_loss

SMALL = {"channels": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}
SPEC = InputSpec(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def make(weight: float, encoder_size: int = 40, **changes: torch.Tensor) -> AnchoredSelfDistillation:
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, **SMALL)
    network = timm.create_model("resnet18", num_classes=0, **SMALL)
    moments = {"feature_mean": torch.rand(64), "feature_std": torch.rand(64) + 0.1, **changes}
    encoder = FrozenEncoder(network, InputSpec(encoder_size, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)), **moments)
    return AnchoredSelfDistillation(model, encoder, AnchoredConfig(anchor=weight), SPEC)


def batch_of(task: AnchoredSelfDistillation, device: str = "cpu") -> dict[str, torch.Tensor]:
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6) % 5
    return {**task.views(images.to(device), BatchRandom(0, 0)), "labels": labels.to(device)}


def test_anchor_loss_against_a_slow_version():
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(4, 7, generator=generator) for _ in range(3)]
    target = torch.randn(4, 7, generator=generator)
    slow = 0.0
    for prediction in predictions:
        for ours, theirs in zip(prediction, target, strict=True):
            slow += (1 - float(ours @ theirs) / float(ours.norm() * theirs.norm())) / 4
    assert float(anchor_loss(predictions, target)) == pytest.approx(slow, abs=1e-5)


def test_loss_is_that_of_the_paper_with_the_anchor_added():
    task = make(weight=4.0)
    batch = batch_of(task)
    parts = task(batch)
    plain = SelfDistillation(task.model, SelfDistillationConfig(), SPEC)(
        {"images": batch["images"], "labels": batch["labels"]}
    )
    features = task.anchor.encoder(batch["encoder"])
    target = (features - task.anchor.feature_mean) / task.anchor.feature_std
    exits = task.model.forward_exits(batch["images"])
    by_hand = sum(
        (1 - F.cosine_similarity(F.linear(vectors, predict.weight, predict.bias), target)).mean()
        for vectors, predict in zip(exits.features, task.anchor.predictors, strict=True)
    )
    torch.testing.assert_close(parts["anchor"], by_hand.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts["loss"], plain["loss"] + 4 * by_hand, atol=1e-3, rtol=1e-4)


def test_clusterfit_is_anchored_by_its_own_features():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, **SMALL).eval()
    encoder = FrozenEncoder(
        timm.create_model("resnet18", num_classes=0, **SMALL), SPEC, torch.rand(64), torch.rand(64) + 0.1
    )
    task = AnchoredClusterFit(model, encoder, AnchoredConfig(anchor=3.0), SPEC)
    batch = batch_of(task)
    parts = task(batch)
    features = model.global_pool(model.forward_features(batch["images"]))
    target = (task.anchor.encoder(batch["encoder"]) - task.anchor.feature_mean) / task.anchor.feature_std
    predicted = task.anchor.predictors[0](features)
    by_hand = F.cross_entropy(model(batch["images"]), batch["labels"])
    by_hand = by_hand + 3 * (1 - F.cosine_similarity(predicted, target).mean())
    torch.testing.assert_close(parts["loss"], by_hand, atol=1e-4, rtol=1e-4)
    assert float(parts["anchor"]) > 0.1


def task_of(kind: type, *, dense: bool) -> AnchoredSelfDistillation:
    """Of a student and an encoder whose last maps of 64-px views are 2 x 2, with the same weights whether `dense`."""
    torch.manual_seed(0)
    name = "sssd_resnet18" if kind is AnchoredSelfDistillation else "resnet18"
    model = timm.create_model(name, num_classes=5, **SMALL)
    network = timm.create_model("resnet18", num_classes=0, **SMALL)
    spec, shape = InputSpec(64, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)), MapShape(channels=64, side=2)
    mean, std = torch.rand(64 + shape.numbers), torch.rand(64 + shape.numbers) + 0.1
    numbers = 64 + shape.numbers if dense else 64
    encoder = FrozenEncoder(network, spec, mean[:numbers], std[:numbers], shape if dense else None)
    return kind(model, encoder, AnchoredConfig(anchor=3.0, dense=dense), spec)


@pytest.mark.parametrize("kind", [AnchoredSelfDistillation, AnchoredClusterFit])
def test_dense_adds_the_cosine_of_every_position(kind):
    task, plain = task_of(kind, dense=True).eval(), task_of(kind, dense=False).eval()
    batch = batch_of(task)
    parts = task(batch)
    known = task.anchor.encoder.forward_features(batch["encoder"]).flatten(1)
    target = (known - task.anchor.feature_mean[64:]) / task.anchor.feature_std[64:]
    last = task.model.forward_features(batch["images"])
    weight, bias = task.anchor.map_predictor.weight[:, :, 0, 0], task.anchor.map_predictor.bias
    slow = 0.0
    for row in range(2):
        for column in range(2):
            predicted = F.linear(last[:, :, row, column], weight, bias)
            position = target.view(6, 64, 2, 2)[:, :, row, column]
            slow += (1 - F.cosine_similarity(predicted, position)).mean() / 4
    torch.testing.assert_close(parts["dense"], slow.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts["loss"], plain(batch)["loss"] + 3 * slow, atol=1e-4, rtol=1e-4)
    parts["loss"].backward()
    assert task.anchor.map_predictor.weight.grad.abs().sum() > 0


def test_a_smaller_map_learns_the_mean_of_the_positions():
    predict = torch.nn.Conv2d(3, 5, 1)
    target, last = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 2, 2)
    averaged = target.view(2, 5, 2, 2, 2, 2).mean((3, 5))
    by_hand = 1 - F.cosine_similarity(predict(last), averaged, dim=1).mean()
    torch.testing.assert_close(dense_loss(predict, last, target), by_hand)
    larger = last.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(dense_loss(predict, larger, averaged), by_hand)


def test_mixed_images_have_no_map_to_learn():
    with pytest.raises(SettingsError, match="dense needs images that are not mixed, and mix is cutmix: remove one"):
        AnchoredConfig(dense=True, mix="cutmix")


def test_the_view_of_both_is_the_same_image():
    task = make(weight=1.0, encoder_size=32)
    batch = batch_of(task)
    torch.testing.assert_close(batch["images"] * 0.2 + 0.5, batch["encoder"] * 0.3 + 0.4)


def test_encoder_stays_as_it_is_and_every_exit_learns():
    task = make(weight=4.0).train()
    before = {name: value.clone() for name, value in task.anchor.encoder.state_dict().items()}
    optimizer = torch.optim.SGD(task.parameter_groups(), lr=0.1)
    task(batch_of(task))["loss"].backward()
    assert all(predict.weight.grad.abs().sum() > 0 for predict in task.anchor.predictors)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in task.anchor.encoder.state_dict().items())


@pytest.mark.parametrize("clusters", [True, False])
def test_the_network_learns_the_clusters_or_its_classifiers_alone_do(clusters):
    torch.manual_seed(0)
    model = timm.create_model("sssd_resnet18", num_classes=5, **SMALL)
    network = timm.create_model("resnet18", num_classes=0, **SMALL)
    encoder = FrozenEncoder(network, SPEC, torch.rand(64), torch.rand(64) + 0.1)
    task = AnchoredSelfDistillation(model, encoder, AnchoredConfig(anchor=0.0, clusters=clusters), SPEC)
    task(batch_of(task))["loss"].backward()
    assert all(exit_classifier.weight.grad.abs().sum() > 0 for exit_classifier in classifiers(model))
    moved = model.conv1.weight.grad is not None and bool(model.conv1.weight.grad.abs().sum() > 0)
    assert moved == clusters
    learns = AnchoredSelfDistillation(model, encoder, AnchoredConfig(anchor=1.0, clusters=False), SPEC)
    learns(batch_of(learns))["loss"].backward()
    assert model.conv1.weight.grad.abs().sum() > 0, "from the features"


def test_a_dimension_that_never_moves_is_not_predicted():
    task = make(weight=1.0, feature_std=torch.tensor([0.0] * 32 + [1.0] * 32))
    assert task(batch_of(task))["loss"].isfinite()


def test_a_dimension_that_cached_features_do_not_resolve_is_not_predicted():
    """Features of a cache are float16: one that moves by 1e-5 around 3.0005 is a constant there, and not its mean."""
    torch.manual_seed(0)
    features = torch.randn(6, 64)
    features[:, 0] = 3.0005 + 1e-5 * features[:, 0]
    moments = {"feature_mean": features.mean(0), "feature_std": features.std(0)}
    anchor = make(weight=1.0, **moments).anchor
    anchor.encoder = None  # the features come with the images
    target = anchor.target({"features": features.half()})
    expected = (features - features.mean(0)) / features.std(0)
    torch.testing.assert_close(target[:, 1:], expected[:, 1:], atol=0.01, rtol=0)
    assert not target[:, 0].any()
