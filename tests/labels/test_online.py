"""Labels of a network's own features: their numbers from one epoch to the next, and what stays on disk."""

import json
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from sssd_zoo.configs import DataConfig, RuntimeConfig
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError
from sssd_zoo.labels.online import OnlineLabels, epochs_to_keep
from sssd_zoo.labels.pseudo_labels import match_labels


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all_renumberings(seed):
    random = np.random.default_rng(seed)
    labels, reference = random.integers(4, size=(2, 40))
    best = max(int((np.array(order)[labels] == reference).sum()) for order in permutations(range(4)))
    matched = match_labels(labels, reference, 4)
    assert (matched == reference).sum() == best
    assert len(np.unique(matched * 4 + labels)) == len(np.unique(labels)), "a renumbering, nothing else"


def test_matching_undoes_a_renumbering():
    reference = np.random.default_rng(0).integers(50, size=1000)
    assert np.array_equal(match_labels(np.random.default_rng(1).permutation(50)[reference], reference, 50), reference)


@pytest.fixture
def online(folder_of_images: Path, tmp_path: Path) -> OnlineLabels:
    torch.manual_seed(0)
    data = load_images(DataConfig(data=str(folder_of_images)), progress=False)
    model = timm.create_model("sssd_resnet18", num_classes=4)
    labels = OnlineLabels(data, 4, seed=0)
    labels.attach(model, tmp_path, InputSpec(32, (0.5,) * 3, (0.25,) * 3), steps_per_epoch=3)
    return labels


def test_labels_of_an_epoch_keep_the_numbers_of_the_last(online):
    labels = [online.for_epoch(epoch, 0) for epoch in range(5)]
    assert all(one.shape == (48,) and one.min() >= 0 and one.max() < 4 for one in labels)
    # The network has not moved: other first centroids, much the same clusters, and so much the same numbers.
    assert min((one == other).float().mean() for one, other in pairwise(labels)) > 0.7  # 37 of 48, as measured
    lines = [json.loads(line) for line in (online.out / "own_labels.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(5))
    assert lines[3]["kept"] == pytest.approx((labels[3] == labels[2]).float().mean().item())
    assert all(0 <= line["nmi"] <= 1 for line in lines)
    assert sorted(path.name for path in (online.out / "own_labels").iterdir()) == [
        f"epoch-{n:04}.npy" for n in (2, 3, 4)
    ]


def test_in_the_middle_of_an_epoch_they_are_those_from_before_it(online):
    labels = online.for_epoch(0, 0)
    with torch.no_grad():
        for parameter in online.network.parameters():
            parameter.add_(0.1)
    assert torch.equal(online.for_epoch(0, 3), labels)
    with pytest.raises(UserError, match="in the middle of epoch 7"):
        online.for_epoch(7, 1)


@pytest.mark.parametrize(("every", "last"), [(1, 2), (5, 2), (3, 1)])
def test_a_resume_finds_the_labels_before_its_checkpoint(every, last):
    """Whenever it was killed, the labels of the epoch before the oldest checkpoint are there."""
    kept = epochs_to_keep(RuntimeConfig(checkpoint_epochs=every, keep_last=last))
    for killed in range(1, 40):  # the epoch that it is in
        checkpoints = list(range(every, killed + 1, every))[-last:]
        for checkpoint in checkpoints:
            assert killed - kept < checkpoint - 1
    assert epochs_to_keep(RuntimeConfig(checkpoint_epochs=0, keep_last=0)) == 2


def test_the_labels_that_a_checkpoint_needs_stay_as_long_as_it_does(online):
    """A resume may start at one of the best, as where the newest is damaged."""

    def kept() -> list[int]:
        return sorted(int(path.stem.removeprefix("epoch-")) for path in (online.out / "own_labels").iterdir())

    online.kept = 2
    best = [online.out / "checkpoints" / f"step-{step:08}" for step in (3, 7)]  # after epoch 0, and in epoch 2
    for path in best:
        path.mkdir(parents=True)
    (online.out / "checkpoints" / "step-00000004-mine").mkdir()
    for epoch in range(5):
        online.for_epoch(epoch)
    assert kept() == [0, 2, 3, 4]
    best[0].rmdir()
    online.for_epoch(5)
    assert kept() == [2, 4, 5]
    online.for_epoch(2, 1)  # a resume from the best one
    online.for_epoch(3)
    with pytest.raises(UserError, match=r"cannot resume at the end of epoch 1 without its labels"):
        online.for_epoch(2)


def test_an_epoch_made_again_has_one_line(online):
    first = [online.for_epoch(epoch, 0) for epoch in range(3)]
    assert torch.equal(online.for_epoch(1, 0), first[1])
    lines = [json.loads(line)["epoch"] for line in (online.out / "own_labels.jsonl").read_text().splitlines()]
    assert lines == [0, 1]
