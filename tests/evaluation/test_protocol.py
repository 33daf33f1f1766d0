"""Which images probes are trained and measured on."""

import pytest
import timm
import torch

import sssd_zoo  # noqa: F401  registers the models with timm
from sssd_zoo.configs import DataConfig, ForwardConfig
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
from sssd_zoo.evaluation.features import check_finite
from sssd_zoo.evaluation.protocol import Evaluation, evaluation_data, evaluation_features, shared_rows


def evaluate(split: str, test_split: str | None, data: str = "cifar10-sample") -> Evaluation:
    config = DataConfig(data=data, split=split, workers=0)
    images = load_images(config, require_labels=True, progress=False)
    return evaluation_data(images, config, test_split=test_split, holdout=0.2, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    features = torch.zeros(4, 9, 3)
    check_finite(features)
    features[2, [1, 5]] = value
    with pytest.raises(UserError, match="exit 3 of the network gives for 2 of 9 images holds NaN or infinity"):
        check_finite(features)


def test_a_network_that_gives_nan_is_not_measured():
    model = timm.create_model("sssd_resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=3)
    evaluation = evaluate("train[:80]", "train[80:200]")
    config = ForwardConfig(precision="fp32", device="cpu")
    evaluation_features(model, evaluation, config)
    with torch.no_grad():
        model.layer4[0].bn2.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="exit 4 of the network gives for 80 of 80 images"):
        evaluation_features(model, evaluation, config)


class TestSplitsShareNoRows:
    @pytest.mark.parametrize(
        ("split", "test_split", "shared"),
        [
            ("train[:200]", "train[150:300]", 50),
            ("train[150:300]", "train[:200]", 50),
            ("train[:200]", "train", 200),
            ("train[:200]", "train[:200]", 200),
            ("train[:200]", "train[0:200]", 200),
            ("train[:200]", "training[199:201]", 1),
            ("train[:10%]", "train[1%:2%]", 100),
        ],
    )
    def test_slices_that_overlap(self, split, test_split, shared):
        message = f"{shared} images of the split {test_split} of cifar10-sample are in {split} too"
        with pytest.raises(UserError) as error:
            evaluate(split, test_split)
        assert str(error.value).startswith(message)
        assert "give a --test_split" in str(error.value)

    def test_the_whole_of_a_split_by_another_name(self, folder_of_images):
        with pytest.raises(UserError, match=r"^48 images of the split training of .* are in train too"):
            evaluate("train", "training", str(folder_of_images))

    def test_slices_that_do_not(self):
        evaluation = evaluate("train[:200]", "train[200:300]")
        assert (len(evaluation.train), len(evaluation.test), evaluation.words) == (200, 100, "split train[200:300]")
        assert len(evaluate("test[:200]", "train[:200]").test) == 200
        assert evaluate("train[:200]", None).test.split == "test"

    def test_rows_are_counted(self):
        splits = {"train": range(1000), "validation": range(1000)}
        for one, other, shared in (
            ("train[:400]", "train[200:600]", 200),
            ("train", "train", 1000),
            ("train[:10%]", "train[90:]", 10),
            ("train[:10%]", "train[10%:]", 0),
            ("train", "validation", 0),
            ("val", "validation[5:6]", 1),
            (None, "train[7:]", 993),
        ):
            assert shared_rows(splits, one, other, "data") == shared_rows(splits, other, one, "data") == shared
