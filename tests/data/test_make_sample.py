"""The sample of CIFAR-10 that comes with the package."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.data import TEST_DATA, load, needs_data
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.loading import split_names
from sssd_zoo.data.make_sample import SAMPLE, draw

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class TestSample:
    @pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
    def test_is_balanced_and_whole(self, split, count):
        data = load("cifar10-sample", split=split, require_labels=True)
        assert (data.name, data.split, data.size, len(data)) == ("cifar10-sample", split, 32, count)
        assert data.class_names == NAMES
        assert np.bincount(data.labels).tolist() == [count // 10] * 10
        assert data.corrupt == []
        assert data.in_memory
        # Shuffled: the first thousand rows hold all classes.
        assert set(data.labels[:1000]) == set(range(10))

    def test_is_small_and_as_its_provenance_says(self):
        files = sorted(SAMPLE.glob("*.parquet"))
        assert sum(file.stat().st_size for file in files) <= 5_000_000
        provenance = (SAMPLE / "PROVENANCE.md").read_text()
        for file in files:
            assert hashlib.sha256(file.read_bytes()).hexdigest() in provenance

    def test_splits(self):
        assert split_names(DataConfig(data="cifar10-sample")) == ["train", "test"]

    @needs_data
    def test_bytes_are_those_of_the_source(self):
        for split in ("train", "test"):
            ours, theirs = (
                pq.read_table(folder / f"{split}.parquet").sort_by("label")
                for folder in (SAMPLE, TEST_DATA / "cifar10")
            )
            for label in range(10):
                small, large = (
                    set(
                        table.filter(pa.compute.equal(table["label"], label))["img"]
                        .combine_chunks()
                        .field("bytes")
                        .to_pylist()
                    )
                    for table in (ours, theirs)
                )
                assert small < large

    def test_draw(self):
        labels = np.random.default_rng(0).integers(0, 4, 400)
        rows = draw(labels, 40, np.random.default_rng(1))
        assert np.bincount(labels[rows]).tolist() == [10] * 4
        assert (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(rows, draw(labels, 40, np.random.default_rng(1)))
        with pytest.raises(ValueError, match="divided"):
            draw(labels, 41, np.random.default_rng(1))
