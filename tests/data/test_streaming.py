"""Images that are read as they are needed: their order, where a run resumes, and what each process sees."""

import hashlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.configs import DataConfig
from sssd_zoo.data.streaming import StreamingImages, load_streaming
from sssd_zoo.errors import UserError
from sssd_zoo.files.hub_client import http


class TestStreaming:
    COUNT = 24

    @pytest.fixture(params=["folder", "parquet"])
    def data(self, request, tmp_path) -> Path:
        """Images that are their number in every pixel."""
        pictures = [Image.new("RGB", (12, 12), (seed, seed, seed)) for seed in range(self.COUNT)]
        if request.param == "parquet":
            return write_parquet(tmp_path / "my.parquet", [file_bytes(image) for image in pictures])
        for seed, image in enumerate(pictures):
            write(tmp_path / "pictures" / f"{seed:02}.png", image)
        return tmp_path / "pictures"

    @staticmethod
    def numbers(data, steps: int, batch: int = 4, **options) -> list[int]:
        stream = load_streaming(DataConfig(data=str(data), streaming=True, max_corrupt=options.pop("max_corrupt", 0)))
        found = []
        for step, (index, images) in zip(
            range(steps), stream.batches(batch, **{"seed": 0, "epoch": 0, **options}), strict=False
        ):
            part = batch // options.get("world", 1)
            assert images.shape == (part, 3, 12, 12)
            assert images.dtype == torch.uint8
            assert (index // part == step + options.get("start", 0)).all()
            found += images[:, 0, 0, 0].tolist()
        return found

    def test_passes_over_all_and_goes_on(self, data):
        seen = self.numbers(data, 2 * self.COUNT // 4)
        first, second = seen[: self.COUNT], seen[self.COUNT :]
        assert sorted(first) == sorted(second) == list(range(self.COUNT))
        assert first != second
        assert first != list(range(self.COUNT))

    def test_is_known_by_its_number_and_first_images(self, data, tmp_path):
        config = DataConfig(data=str(data), streaming=True)
        stream = load_streaming(config)
        assert stream.count == (self.COUNT if data.is_dir() else None), "parquet is not read to its end"
        assert load_streaming(config).identity == stream.identity
        other = tmp_path / "other" / data.name
        pictures = [Image.new("RGB", (12, 12), (seed, 0, seed)) for seed in range(self.COUNT)]
        if data.is_dir():
            for seed, image in enumerate(pictures):
                write(other / f"{seed:02}.png", image)
        else:
            other.parent.mkdir()
            write_parquet(other, [file_bytes(image) for image in pictures])
        identity = load_streaming(replace(config, data=str(other))).identity
        assert {name for name in identity if identity[name] != stream.identity[name]} == {"first_images"}

    def test_order_is_a_function_of_seed_and_epoch(self, data):
        assert self.numbers(data, 6) == self.numbers(data, 6)
        assert self.numbers(data, 6) != self.numbers(data, 6, epoch=1)
        assert self.numbers(data, 6) != self.numbers(data, 6, seed=7)

    def test_start_resumes(self, data):
        whole = self.numbers(data, 9, epoch=2)
        assert self.numbers(data, 4, epoch=2, start=5) == whole[20:]

    def test_processes_share_the_rows(self, data):
        parts = [self.numbers(data, 6, rank=rank, world=2) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(self.COUNT))

    def test_corrupt(self, tmp_path, caplog):
        pictures = [file_bytes(Image.new("RGB", (12, 12), (n, n, n))) for n in range(8)]
        file = write_parquet(tmp_path / "my.parquet", [*pictures[:3], b"x", *pictures[4:]])
        seen = self.numbers(file, 4, max_corrupt=1)  # two passes: the image is counted once
        assert len(seen) == 16
        assert 3 not in seen
        assert f"image {hashlib.sha256(b'x').hexdigest()[:12]}: it is not an image" in caplog.text
        with pytest.raises(UserError, match=r"1 image of .* more than max_corrupt 0"):
            self.numbers(file, 4)
        alone = self.numbers(file, 8, batch=1, max_corrupt=1)
        assert sorted(alone) == [0, 0, 1, 2, 4, 5, 6, 7], "the first image stands for a batch of corrupt ones"
        nothing = write_parquet(tmp_path / "nothing.parquet", [b"x", b"y"])
        with pytest.raises(UserError, match="none of 2 images"):
            self.numbers(nothing, 1, batch=1, max_corrupt=9)

    def test_identity_tells_splits_and_revisions_apart(self, data):
        config = DataConfig(data=str(data), streaming=True)
        one, other = (load_streaming(replace(config, revision=revision)) for revision in (None, "v2"))
        assert one.identity == {**other.identity, "revision": None}
        assert (one.identity["split"], other.identity["revision"]) == ("train", "v2")

    @pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, http.ConnectError, http.ReadTimeout])
    def test_a_lost_connection_is_one_line(self, data, kind, monkeypatch):
        def rows(self, *args):
            yield from islice(endless(self, *args), 10)
            try:
                raise kind("Server Disconnected")
            except Exception as error:
                raise OSError("cannot read the file") from error

        endless = StreamingImages._endless
        monkeypatch.setattr(StreamingImages, "_endless", rows)
        with pytest.raises(UserError, match=r"connection to .*\(train\) was lost \(Server Disc.*--resume") as told:
            self.numbers(data, 6)
        assert "\n" not in str(told.value)

    @pytest.mark.parametrize("status", [401, 404])
    def test_other_errors_of_reading_stay_what_they_are(self, data, status, monkeypatch):
        request = http.Request("GET", "https://huggingface.co")
        refusal = http.HTTPStatusError("refused", request=request, response=http.Response(status, request=request))

        def rows(self, *args):
            raise refusal
            yield

        monkeypatch.setattr(StreamingImages, "_endless", rows)
        with pytest.raises(http.HTTPStatusError, match="refused"):
            self.numbers(data, 1)

    def test_bad_input(self, data, tmp_path):
        with pytest.raises(UserError, match="multiple of the 3 processes"):
            self.numbers(data, 1, world=3)
        with pytest.raises(UserError, match="fewer rows than there are processes"):
            self.numbers(write_parquet(tmp_path / "one.parquet", [file_bytes(picture(0))]), 1, rank=1, world=2)
        with pytest.raises(UserError, match="has no rows"):
            load_streaming(DataConfig(data=str(write_parquet(tmp_path / "none.parquet", [])), streaming=True))
