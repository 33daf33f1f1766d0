"""Features on disk: what one and two processes write, and what a mistake leaves behind."""

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.commands import command, sssd
from helpers.disk import files_up_to
from sssd_zoo.errors import UserError
from sssd_zoo.labels.feature_file import FeatureFile, write_features
from sssd_zoo.labels.kmeans import normalise


def batches_of(features: torch.Tensor, size: int = 7):
    """Batches in another order than the rows', of two exits."""
    for places in torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).split(size):
        yield places, torch.stack([torch.zeros_like(features[places]), features[places]])


@pytest.fixture
def features():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


def test_the_file_holds_the_last_exits_normalised_features(features, tmp_path):
    path = tmp_path / "labels" / "features.npy"
    write_features(path, 50, batches_of(features))
    assert [file.name for file in path.parent.iterdir()] == ["features.npy"]
    file = FeatureFile(path)
    assert file.shape == (50, 6)
    expected = normalise(features.numpy().copy())
    np.testing.assert_array_equal(file.part(slice(0, 50)), expected)
    np.testing.assert_array_equal(file.rows(np.array([49, 0, 3])), expected[[49, 0, 3]])
    chunks = list(file.chunks(16))
    assert [len(chunk) for _, chunk in chunks] == [16, 16, 16, 2]
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in chunks]), expected)
    assert [place.stop for place, _ in file.chunks(16, least=3)] == [16, 32, 50]
    assert [place.stop for place, _ in file.chunks(64, least=60)] == [50]


def test_what_is_read_can_be_changed_without_changing_the_file(features, tmp_path):
    write_features(tmp_path / "f.npy", 50, batches_of(features))
    before = (tmp_path / "f.npy").read_bytes()
    FeatureFile(tmp_path / "f.npy").part(slice(0, 5))[:] = 7
    assert (tmp_path / "f.npy").read_bytes() == before


def test_a_failure_half_way_leaves_the_old_file_and_no_litter(features, tmp_path):
    path = tmp_path / "f.npy"
    write_features(path, 50, batches_of(features))
    before = path.read_bytes()

    def broken():
        yield next(batches_of(-features))
        raise RuntimeError("the network fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_features(path, 50, broken())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.npy"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE as on Linux")
def test_a_full_disk_is_told_before_anything_is_computed(features, tmp_path):
    left = batches_of(features)
    with files_up_to(600), pytest.raises(UserError, match="cannot write"):
        write_features(tmp_path / "f.npy", 50, left)
    assert sum(len(places) for places, _ in left) == 43, "one batch was computed, to know the length of a feature"
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npy").write_text("not an array")
    np.save(tmp_path / "double.npy", np.zeros((3, 2)))
    for name, words in (("none.npy", "cannot read"), ("text.npy", "cannot read"), ("double.npy", "float64")):
        with pytest.raises(UserError, match=words):
            FeatureFile(tmp_path / name)


@pytest.mark.slow
def test_labels_from_disk_and_of_two_processes_are_those_of_one_in_memory(folder_of_images, tmp_path):
    words = ["--data", str(folder_of_images), "--model", "sssd_resnet18_cifar", "--k", "5", "--batch_size", "10"]
    words += ["--precision", "fp32"]
    assert sssd("pseudo-label", *words, "--out", tmp_path / "memory", "--on_disk", "false") == 0
    assert sssd("pseudo-label", *words, "--out", tmp_path / "disk", "--on_disk", "true") == 0
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "train/pseudo_label.py", *words]
    two = command(*launch, "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    expected = pq.read_table(tmp_path / "memory" / "labels.parquet")
    assert len(set(expected["label"].to_pylist())) > 1
    assert pq.read_table(tmp_path / "disk" / "labels.parquet").equals(expected)
    # The other process starts with threads of its own number, so its products may round otherwise.
    shared = pq.read_table(tmp_path / "two" / "labels.parquet")
    assert shared["label"].equals(expected["label"])
    np.testing.assert_allclose(shared["distance"], expected["distance"], rtol=1e-4, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "disk", "two"}, "the features are gone"
