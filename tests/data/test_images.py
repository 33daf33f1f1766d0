"""Images from bytes to stored pixels, the size in which they are stored, and the fingerprint of a set."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.data import load
from helpers.images import file_bytes, picture, write, write_parquet
from sssd_zoo.data import images as images_module
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import decode, spaced
from sssd_zoo.data.opening import Encoded


class TestDecode:
    @pytest.mark.parametrize(
        ("mode", "kind", "colour"),
        [
            ("RGB", "JPEG", (204, 51, 0)),
            ("RGB", "PNG", (204, 51, 0)),
            ("RGB", "GIF", (204, 51, 0)),
            ("RGB", "WEBP", (204, 51, 0)),
            ("RGBA", "PNG", (204, 51, 0)),
            ("CMYK", "JPEG", (204, 51, 0)),
            ("CMYK", "TIFF", (204, 51, 0)),
            ("YCbCr", "JPEG", (204, 51, 0)),
            ("P", "PNG", (204, 51, 0)),
            ("L", "PNG", (91, 91, 91)),
            ("L", "JPEG", (91, 91, 91)),
            ("LA", "PNG", (91, 91, 91)),
            ("1", "PNG", (255, 255, 255)),
        ],
    )
    def test_every_mode_becomes_rgb(self, mode, kind, colour):
        source = Image.new("RGB", (8, 8), (255, 255, 255) if mode == "1" else (204, 51, 0))
        pixels = decode(Encoded(0, file_bytes(source.convert(mode), kind), None), 8)
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels[:, 4, 4], colour, atol=4)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bits_keep_the_upper_8(self, kind):
        grey = Image.fromarray(np.full((8, 8), 0x8042, np.uint16))
        assert (decode(Encoded(0, file_bytes(grey, kind), None), 8) == 0x80).all()

    @pytest.mark.parametrize(("value", "stored"), [(0.5, 127), (200.0, 200), (1000.0, 255), (-5.0, 0)])
    def test_floats(self, value, stored):
        grey = Image.fromarray(np.full((8, 8), value, np.float32))
        assert (decode(Encoded(0, file_bytes(grey, "TIFF"), None), 8) == stored).all()

    def test_transparent_palette(self):
        image = Image.new("P", (8, 8), 0)
        image.putpalette([10, 20, 30])
        data = file_bytes(image, transparency=b"\x00")
        assert decode(Encoded(0, data, None), 8)[:, 0, 0].tolist() == [10, 20, 30]

    def test_first_frame(self):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert decode(Encoded(0, data, None), 8)[:, 0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
    def test_exif_orientation(self, kind):
        image = Image.new("RGB", (16, 16), "black")
        image.paste("white", (0, 0, 16, 4))  # a white top
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        pixels = decode(Encoded(0, file_bytes(image, kind, exif=exif), None), 16)
        assert pixels[:, 1].max() < 10
        assert pixels[:, 14].min() > 245

    def test_pixels_of_an_image_of_the_size_are_untouched(self):
        image = picture(0)
        expected = np.asarray(image).transpose(2, 0, 1)
        np.testing.assert_array_equal(decode(Encoded(0, file_bytes(image), None), 12), expected)

    @pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
    def test_the_middle_of_an_oblong_is_kept(self, width, height):
        image = Image.new("RGB", (width, height), "red")
        middle = Image.new("RGB", (20, 20), "blue")
        image.paste(middle, ((width - 20) // 2, (height - 20) // 2))
        pixels = decode(Encoded(0, file_bytes(image), None), 10)
        # The filter reaches one pixel beyond the crop.
        assert (pixels[:, 1:-1, 1:-1] == np.array([0, 0, 255])[:, None, None]).all()

    def test_large_jpegs_shrink_as_without_the_shortcut(self):
        smooth = picture(1, 8).resize((640, 480), Image.Resampling.BICUBIC)
        jpeg = file_bytes(smooth, "JPEG", quality=95)
        shortcut = decode(Encoded(0, jpeg, None), 64).astype(int)
        slow = decode(Encoded(0, file_bytes(Image.open(io.BytesIO(jpeg))), None), 64)
        assert np.abs(shortcut - slow).mean() < 1

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "empty"),
            (b"not an image", "not an image"),
            (file_bytes(picture(0, 64), "JPEG")[:-200], "truncated"),
            (file_bytes(picture(0, 64))[:-200], "truncated"),
            (file_bytes(picture(0, 64))[:20], ""),
        ],
    )
    def test_corrupt(self, data, reason):
        with pytest.raises(CorruptImageError, match=f"(?i){reason}") as error:
            decode(Encoded(0, data, None), 8)
        assert "\n" not in str(error.value)


class TestStorageSize:
    @pytest.mark.parametrize(
        ("sides", "options", "size"),
        [
            ([(20, 20), (20, 20)], {}, 20),
            ([(20, 20), (24, 24)], {"default_size": 48}, 48),
            ([(20, 30), (20, 30)], {"default_size": 48}, 48),
            ([(97, 97), (97, 97)], {"default_size": 48}, 48),
            ([(20, 20), (20, 20)], {"storage_size": 16}, 16),
        ],
    )
    def test_is_natural_or_chosen(self, tmp_path, sides, options, size):
        for seed, (width, height) in enumerate(sides):
            write(tmp_path / f"{seed}.png", picture(seed, width, height))
        data = load(tmp_path, **options)
        assert data.size == size
        assert data.gather(torch.arange(2)).shape == (2, 3, size, size)


class TestFingerprint:
    def test_depends_on_content_and_order_only(self, tmp_path):
        pictures = [file_bytes(picture(seed)) for seed in range(6)]
        first = load(write_parquet(tmp_path / "a.parquet", pictures, label=[0, 1, 0, 1, 0, 1]))
        for number, data in enumerate(pictures):
            write(tmp_path / "folder" / "x.png", picture(0)).with_name(f"{number}.png").write_bytes(data)
        (tmp_path / "folder" / "x.png").unlink()
        same = [
            load(tmp_path / "a.parquet", in_memory=False),
            load(tmp_path / "a.parquet", storage_size=5),
            load(tmp_path / "folder"),
            load(write_parquet(tmp_path / "b.parquet", pictures)),
        ]
        assert {data.fingerprint for data in same} == {first.fingerprint}
        assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)

        swapped = [*pictures[:2], pictures[3], pictures[2], *pictures[4:]]
        joined = [pictures[0] + pictures[1], b"", *pictures[2:]]
        others = [swapped, pictures[:-1], [*pictures, pictures[0]], joined]
        prints = [
            load(write_parquet(tmp_path / f"other{number}.parquet", other), max_corrupt=9).fingerprint
            for number, other in enumerate(others)
        ]
        assert len({first.fingerprint, *prints}) == 5

    def test_of_large_sets_is_sampled(self, tmp_path, monkeypatch):
        monkeypatch.setattr(images_module, "FULL_FINGERPRINT", 9)
        monkeypatch.setattr(images_module, "SAMPLED_FINGERPRINT", 4)
        assert spaced(10, 4).tolist() == [0, 3, 6, 9]
        pictures = [file_bytes(picture(seed)) for seed in range(10)]

        def of(name: str, data: list[bytes]) -> str:
            return load(write_parquet(tmp_path / f"{name}.parquet", data)).fingerprint

        first = of("first", pictures)
        assert of("unseen", [*pictures[:4], pictures[0], *pictures[5:]]) == first
        assert of("seen", [*pictures[:3], pictures[0], *pictures[4:]]) != first
        assert of("longer", [*pictures[:9], pictures[0], pictures[9]]) != first
