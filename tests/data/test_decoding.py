"""What pictures of every kind become, and that none of them takes the memory of a bomb."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import command, one_line, sssd
from sssd_zoo.configs import DataConfig, SettingsError
from sssd_zoo.configs.data import MAX_PIXELS
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import decode
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.opening import Encoded, encoded
from sssd_zoo.errors import UserError


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def written_tiff(values: np.ndarray, sample_format: int) -> bytes:
    """A grey TIFF of any type, also of those that Pillow reads and does not write."""
    height, width = values.shape
    return _tiff(width, height, values.itemsize * 8, sample_format, values.tobytes(), compression=1)


def _tiff(width: int, height: int, bits: int, sample_format: int, data: bytes, compression: int) -> bytes:
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 277: 1, 278: height, 279: len(data)}
    tags |= {339: sample_format}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def zeros(count: int) -> bytes:
    """So many zero bytes, deflated: the same block again and again, as compressing them would take half a minute."""
    unit = 2**20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(unit)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = rest.compress(bytes(count % unit)) + rest.flush()
    return b"\x78\xda" + block * (count // unit) + end + struct.pack(">HH", count % 65521, 1)  # Adler-32 of zeros


def float_bomb(side: int) -> bytes:
    return _tiff(side, side, 32, 3, zeros(4 * side * side), compression=8)


def png_bomb(width: int, height: int, bits: int, colour: int, bytes_per_pixel: int) -> bytes:
    return png(width, height, bits, colour, zeros(height * (1 + width * bytes_per_pixel)))


def png(width: int, height: int, bits: int, colour: int, deflated: bytes) -> bytes:
    """A PNG of pixels that are deflated already; Pillow writes no 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3)) if colour == 3 else b""
    pixels = chunk(b"IDAT", deflated)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + pixels + chunk(b"IEND", b"")


def stored(data: bytes, size: int = 32) -> np.ndarray:
    return decode(Encoded(0, data, None), size)[0]


def ramp(low: float, high: float, kind: type) -> np.ndarray:
    return np.tile(np.linspace(low, high, 32), (32, 1)).astype(kind)


class TestDeepPixels:
    @pytest.mark.parametrize(
        ("low", "high", "kind"),
        [
            (300, 4095, np.float32),
            (0, 1.0001, np.float32),  # a little over what would be 0..1
            (0, 0.01, np.float32),
            (-1, 1, np.float32),
            (-1000, 3000, np.float32),
            (0, 65535, np.float32),
            (1e30, 3e38, np.float32),
            (-3e38, 3e38, np.float32),  # its span is more than float32 holds
            (0.5, 10, np.float32),
            (10_000, 10_100, np.float32),
            (1e-40, 1e-38, np.float32),
            (0, 4095, np.uint16),
            (7000, 8000, np.uint16),  # a thermal camera's
            (0, 255, np.uint16),
            (0, 65535, np.uint16),
            (0, 4095, np.int32),
            (-500, 500, np.int32),
            (-(2**31), 2**31 - 1, np.int32),
            (0, 2**32 - 1, np.uint32),
            (2**31 + 5, 2**31 + 9000, np.uint32),
            (-3000, 3000, np.int16),
        ],
    )
    def test_no_range_becomes_one_square(self, low, high, kind):
        values = ramp(low, high, kind)
        levels = stored(written_tiff(values, {"u": 1, "i": 2, "f": 3}[np.dtype(kind).kind]))
        assert len(np.unique(levels)) >= 25
        assert (np.diff(levels[0].astype(int)) >= 0).all()

    @pytest.mark.parametrize(
        ("values", "levels"),
        [
            (ramp(0, 1, np.float32), np.linspace(0, 255, 32)),
            (ramp(0.2, 0.8, np.float32), np.linspace(51, 204, 32)),
            (ramp(20, 200, np.float32), np.linspace(20, 200, 32)),
            (ramp(0, 65535, np.uint16), np.linspace(0, 255, 32)),
            (ramp(10_000, 50_000, np.uint16), np.linspace(39, 195, 32)),
            (ramp(30, 200, np.int32), np.linspace(30, 200, 32)),
            (ramp(1000, 2000, np.float32), np.linspace(0, 255, 32)),
        ],
    )
    def test_the_rule(self, values, levels):
        np.testing.assert_allclose(stored(tiff(values))[0], levels, atol=1)

    def test_16_bit_png_is_scaled_as_tiff_is(self):
        values = ramp(300, 4095, np.uint16)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        np.testing.assert_array_equal(stored(buffer.getvalue()), stored(tiff(values)))

    @pytest.mark.parametrize(
        ("value", "kind", "level"),
        [
            (0.0, np.float32, 0),
            (1.0, np.float32, 255),
            (-7.0, np.float32, 0),
            (1e9, np.float32, 255),
            (77, np.int32, 77),
            (-7, np.int32, 0),
            (10**6, np.int32, 255),
            (77, np.uint16, 77),
        ],
    )
    def test_one_value(self, value, kind, level):
        assert (stored(tiff(np.full((32, 32), value, kind))) == level).all()

    def test_values_that_are_no_numbers_do_not_count(self):
        values = ramp(300, 4095, np.float32)
        clean = stored(tiff(values))
        values[0, :3] = np.nan, np.inf, -np.inf
        levels = stored(tiff(values))
        np.testing.assert_array_equal(levels[1:], clean[1:])
        assert levels[0, :3].tolist() == [0, 255, 0]
        with pytest.raises(CorruptImageError, match="finite"):
            stored(tiff(np.full((32, 32), np.nan, np.float32)))

    @pytest.mark.parametrize("no_data", [-9999.0, np.finfo(np.float32).min])
    def test_no_data_of_a_geotiff_does_not_count(self, no_data):
        values = ramp(0, 0.4, np.float32)
        clean = stored(tiff(values))
        values[:4] = no_data
        levels = stored(tiff(values, tiffinfo={42113: f"{no_data:.17e}"}))
        np.testing.assert_array_equal(levels[4:], clean[4:])
        assert (levels[:4] == 0).all()

    @pytest.mark.parametrize("kind", [np.float64, np.uint64])
    def test_what_pillow_cannot_read_is_refused(self, kind):
        with pytest.raises(CorruptImageError, match="pixels that Pillow does not read"):
            stored(written_tiff(ramp(0, 1000, kind), 3 if kind is np.float64 else 1))

    def test_an_image_of_many_strips(self):
        values = np.linspace(300, 4095, 1200 * 1000, dtype=np.float32).reshape(1200, 1000)
        expected = (values - 300) / 3795 * 255
        levels = decode(Encoded(0, tiff(values), None), 1000)[0]
        assert np.abs(levels.astype(int) - expected[100:1100].astype(int)).max() <= 1

    @pytest.mark.parametrize("bands", [2, 3, 4])
    def test_16_bit_colour(self, bands):
        def image(greatest: int) -> bytes:
            values = np.repeat(ramp(0, greatest, np.uint16)[..., None], bands, -1).astype(">u2")
            if bands != 3:
                values[..., -1] = 65535  # alpha
            rows = b"".join(b"\0" + row.tobytes() for row in values)
            return png(32, 32, 16, {2: 4, 3: 2, 4: 6}[bands], zlib.compress(rows))

        np.testing.assert_allclose(stored(image(65535))[0], np.linspace(0, 255, 32), atol=1)
        for greatest in (255, 4095):
            with pytest.raises(CorruptImageError, match="16-bit colours use less than a tenth"):
                stored(image(greatest))

    def test_a_turned_float_tiff(self):
        values = np.zeros((16, 32), np.float32)
        values[:4] = 1000  # a bright top, which a quarter turn makes the right edge
        levels = decode(Encoded(0, tiff(values, tiffinfo={274: 6}), None), 16)[0]
        assert levels[:, -1].min() > 200
        assert levels[:, 0].max() == 0


class TestKinds:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
    def test_every_mode_is_decoded(self, mode):
        rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture = rgb.convert("L").convert(mode) if mode in ("I;16", "I", "F") else rgb.convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, {"LA": "PNG", "YCbCr": "JPEG"}.get(mode, "TIFF"))
        assert len(np.unique(stored(buffer.getvalue()))) >= 2

    def test_what_is_not_a_file_of_pixels_is_named(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        for path, reason in (
            (tmp_path / "pipe.png", "regular"),
            (tmp_path, "regular"),
            (tmp_path / "none.png", "No such"),
        ):
            assert reason in (encoded(0, {"bytes": None, "path": str(path)}).error or "")


class TestPixelLimit:
    def test_the_header_decides(self):
        data = tiff(np.zeros((30, 40), np.float32))
        assert decode(Encoded(0, data, None), 8, max_pixels=1200).shape == (3, 8, 8)
        with pytest.raises(CorruptImageError, match=r"40 x 30 pixels.*--max_pixels 1199"):
            decode(Encoded(0, data, None), 8, max_pixels=1199)

    def test_a_format_whose_header_lies_is_not_read(self):
        inner = png_bomb(9400, 9400, 8, 6, 4)  # in an icon of 16 x 16
        entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
        with pytest.raises(CorruptImageError, match="not an image of a known format"):
            stored(struct.pack("<HHH", 0, 1, 1) + entry + inner)

    @pytest.mark.parametrize("progressive", [False, True])
    def test_a_jpeg_counts_as_what_is_decoded_of_it(self, progressive):
        buffer = io.BytesIO()
        Image.new("RGB", (800, 800), "red").save(buffer, "JPEG", progressive=progressive)
        image = Encoded(0, buffer.getvalue(), None)
        if progressive:  # all of its coefficients are held, however small it is wanted
            with pytest.raises(CorruptImageError, match="800 x 800"):
                decode(image, 50, max_pixels=20_000)
        else:
            assert decode(image, 50, max_pixels=20_000).shape == (3, 50, 50)

    def test_bombs_take_no_memory(self, tmp_path):
        side = 13_300
        bombs = {
            "float.tif": float_bomb(side),
            "rgba.png": png_bomb(side, side, 8, 6, 4),
            "deep.png": png_bomb(side, side, 16, 0, 2),
            "palette.png": png_bomb(side, side, 8, 3, 1),
            "beyond_pillows_limit.png": png_bomb(60_000, 60_000, 1, 0, 0),
        }
        for name, data in bombs.items():
            (tmp_path / name).write_bytes(data)
            assert len(data) < 1.5e6
        program = """
import json, resource, sys
from sssd_zoo.data.images import CorruptImageError, decode, encoded, natural_size
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reasons = []
for path in sys.argv[1:]:
    image = encoded(0, {"bytes": None, "path": path})
    natural_size([image])
    try:
        decode(image, 32)
    except CorruptImageError as error:
        reasons.append(str(error))
print(json.dumps([reasons, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024]))
"""
        done = command("-W", "ignore", "-c", program, *(str(tmp_path / name) for name in bombs))
        assert done.returncode == 0, done.stderr
        reasons, megabytes = json.loads(done.stdout)
        assert len(reasons) == len(bombs)
        assert all("--max_pixels" in reason for reason in reasons)
        assert megabytes < 60

    @pytest.mark.slow
    def test_the_largest_that_is_allowed_takes_no_gigabytes(self, tmp_path):
        side = int(MAX_PIXELS**0.5)
        program = """
import resource, sys
from sssd_zoo.data.images import decode, encoded
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(encoded(0, {"bytes": None, "path": sys.argv[1]}), 32)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""
        for name, data in {
            "float.tif": float_bomb(side),
            "rgba.png": png_bomb(side, side, 8, 6, 4),
            "palette.png": png_bomb(side, side, 8, 3, 1),
        }.items():
            (tmp_path / name).write_bytes(data)
            done = command("-W", "ignore", "-c", program, str(tmp_path / name))
            assert done.returncode == 0, done.stderr
            assert float(done.stdout) < 1100, name

    def test_a_data_set_names_it(self, tmp_path):
        for number in range(3):
            Image.new("RGB", (20 + number, 20), "red").save(tmp_path / f"{number}.png")
        config = DataConfig(data=str(tmp_path), max_pixels=430, workers=1)
        with pytest.raises(UserError, match=r"2\.png: its 22 x 20 pixels are more than --max_pixels 430"):
            load_images(config, progress=False)
        for in_memory in (True, False):
            config = DataConfig(data=str(tmp_path), max_pixels=430, max_corrupt=1, workers=1, in_memory=in_memory)
            assert load_images(config, progress=False).rows.tolist() == [0, 1]
        with pytest.raises(SettingsError, match="max_pixels is 0"):
            load_images(DataConfig(data=str(tmp_path), max_pixels=0), progress=False)

    def test_predict_names_it(self, tmp_path, capsys):
        image = tmp_path / "large.png"
        Image.new("RGB", (50, 50), "red").save(image)
        words = ["predict", "sssd_resnet18_cifar.cifar10", image, "--output", "1", "--device", "cpu"]
        assert sssd(*words, "--max_pixels", "2499") == 2
        assert "50 x 50 pixels" in one_line(capsys)
        assert sssd(*words, "--max_pixels", "2500") == 0
        assert Path(image).name in capsys.readouterr().out
