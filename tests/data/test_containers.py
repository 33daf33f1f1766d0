"""DICOM, TIFF of several channels and pages: with the packages that read them, and without."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.deep import write_dicom
from sssd_zoo.configs import DataConfig, SettingsError
from sssd_zoo.data import containers
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.loading import load_images
from sssd_zoo.errors import UserError

SIDE = 16


def load(folder, **settings):
    return load_images(DataConfig(data=str(folder), **settings), progress=False)


def pixels(data):
    return data.gather(torch.arange(len(data))).numpy()


def pages(seed=0, count=4):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE)).astype(np.uint8)


def write_pages(path, values):
    """By Pillow, so that the tests of what needs no further package need none either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = map(Image.fromarray, values)
    first.save(path, save_all=True, append_images=others)
    return path


class TestPages:
    def test_the_first_is_read_and_that_is_told(self, tmp_path, caplog):
        write_pages(tmp_path / "stack.tif", pages())
        data = load(tmp_path)
        assert len(data) == 1
        np.testing.assert_array_equal(pixels(data)[0, 0], pages()[0])
        assert "have several pages" in caplog.text
        assert "--pages all" in caplog.text

    def test_all_are_images(self, tmp_path):
        pytest.importorskip("tifffile")
        write_pages(tmp_path / "a" / "stack.tif", pages())
        Image.fromarray(pages(1)[0]).save(tmp_path / "a" / "zz.png")
        write_pages(tmp_path / "b" / "other.tif", pages(2, 2))
        data = load(tmp_path, pages="all")
        assert data.labels.tolist() == [0] * 5 + [1] * 2
        expected = [*pages(), pages(1)[0], *pages(2, 2)]
        np.testing.assert_array_equal(pixels(data)[:, 0], np.stack(expected))
        one = load(tmp_path, pages="all", channels=1)
        assert one.fingerprint == data.fingerprint
        assert one.fingerprint != load(tmp_path).fingerprint
        np.testing.assert_array_equal(pixels(one)[:, 0], np.stack(expected))

    def test_a_damaged_page_is_named(self, tmp_path):
        tifffile = pytest.importorskip("tifffile")
        file = write_pages(tmp_path / "stack.tif", pages())
        with tifffile.TiffFile(file) as opened:
            offset = opened.pages[-1].dataoffsets[0]
        write_pages(tmp_path / "good.tif", pages())
        content = bytearray(file.read_bytes())
        del content[offset + 5 :]
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"stack\.tif"):
            load(tmp_path, pages="all")

    def test_a_page_for_each_channel(self, tmp_path):
        pytest.importorskip("tifffile")
        write_pages(tmp_path / "stack.tif", pages())
        np.testing.assert_array_equal(pixels(load(tmp_path, channels=4))[0], pages())

    def test_a_file_that_lies_in_several_folders_is_read_once(self, tmp_path, caplog):
        pytest.importorskip("tifffile")
        for number in range(2):
            write_pages(tmp_path / "a" / f"{number}.tif", pages(number, 3))
        write_pages(tmp_path / "b" / "copy.tif", pages(0, 3))
        write_pages(tmp_path / "b" / "own.tif", pages(5, 2))
        (tmp_path / "b" / "again.tif").symlink_to(tmp_path / "a" / "1.tif")
        config = DataConfig(data=[str(tmp_path / "a"), str(tmp_path / "b")], pages="all", channels=1)
        data = load_images(config, progress=False)
        expected = [*pages(0, 3), *pages(1, 3), *pages(0, 3), *pages(5, 2)]
        np.testing.assert_array_equal(pixels(data)[:, 0], np.stack(expected))
        assert "1 files (train) lie in several of a and b" in caplog.text
        assert "1 images (train) lie in several of a and b under different names" in caplog.text

    def test_of_what_is_no_file(self):
        with pytest.raises(UserError, match="--pages all is for folders and lists"):
            load("cifar10-sample", pages="all")
        with pytest.raises(SettingsError, match="a stream does not have"):
            DataConfig(data="x", pages="all", streaming=True)


class TestTiff:
    @pytest.mark.parametrize("planar", ["contig", "separate"])
    def test_several_channels(self, tmp_path, planar):
        tifffile = pytest.importorskip("tifffile")
        values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 6)).astype(np.uint16)
        stored = values if planar == "contig" else values.transpose(2, 0, 1)
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar)
        data = load(tmp_path, channels=6)
        assert (data.size, data.pixels.bits) == (SIDE, 16)
        np.testing.assert_array_equal(pixels(data)[0], values.transpose(2, 0, 1))
        with pytest.raises(UserError, match=r"a\.tif: .*give --channels"):
            load(tmp_path)

    @pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}, {"byteorder": ">"}])
    def test_16_bit_colour_needs_no_further_package(self, tmp_path, options, monkeypatch):
        tifffile = pytest.importorskip("tifffile")
        values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3)).astype(np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **options)
        monkeypatch.setitem(sys.modules, "tifffile", None)
        np.testing.assert_array_equal(pixels(load(tmp_path, channels=3))[0], values.transpose(2, 0, 1))


class TestDicom:
    @pytest.fixture(autouse=True)
    def _needs_pydicom(self):
        pytest.importorskip("pydicom")

    def test_the_full_stored_range(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE))
        write_dicom(tmp_path / "a.dcm", values, RescaleSlope=1, RescaleIntercept=-1024)
        deep = load(tmp_path, channels=1)
        assert deep.pixels.bits == 16
        np.testing.assert_array_equal(pixels(deep)[0, 0], np.rint(values / 4095 * 65535))
        shallow = pixels(load(tmp_path))
        assert np.abs(shallow[0, 0] - values / 4095 * 255).max() <= 1

    def test_signed_inverted_and_8_bits(self, tmp_path):
        values = np.random.default_rng(0).integers(-2048, 2048, (SIDE, SIDE))
        write_dicom(tmp_path / "signed.dcm", values, PixelRepresentation=1)
        np.testing.assert_array_equal(pixels(load(tmp_path, channels=1))[0, 0], np.rint((values + 2048) / 4095 * 65535))
        small = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE))
        write_dicom(tmp_path / "signed.dcm", small, bits=8, PhotometricInterpretation="MONOCHROME1")
        data = load(tmp_path, channels=1)
        assert data.pixels.bits == 8
        np.testing.assert_array_equal(pixels(data)[0, 0], 255 - small)

    def test_a_negative_slope_turns_the_range_round(self, tmp_path):
        values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
        write_dicom(tmp_path / "a.dcm", values, RescaleSlope=-2, RescaleIntercept=10)
        np.testing.assert_array_equal(pixels(load(tmp_path, channels=1))[0, 0], np.rint((4095 - values) / 4095 * 65535))

    def test_frames(self, tmp_path, caplog):
        values = np.random.default_rng(0).integers(0, 4096, (3, SIDE, SIDE))
        write_dicom(tmp_path / "a.dcm", values)
        assert len(load(tmp_path, channels=1)) == 1
        assert "have several pages" in caplog.text
        data = load(tmp_path, channels=1, pages="all")
        np.testing.assert_array_equal(pixels(data)[:, 0], np.rint(values / 4095 * 65535))

    @pytest.mark.parametrize("content", [b"", b"junk" * 20])
    def test_damaged(self, tmp_path, content):
        write_dicom(tmp_path / "a.dcm", np.zeros((SIDE, SIDE)))
        (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM" + content)
        with pytest.raises(UserError, match=r"b\.dcm: "):
            load(tmp_path, channels=1)
        whole = (tmp_path / "a.dcm").read_bytes()
        (tmp_path / "b.dcm").write_bytes(whole[:-100])
        with pytest.raises(UserError, match=r"b\.dcm: its DICOM pixels cannot be decoded"):
            load(tmp_path, channels=1)

    def test_more_pixels_than_allowed(self, tmp_path):
        write_dicom(tmp_path / "a.dcm", np.zeros((SIDE, SIDE)))
        with pytest.raises(UserError, match=r"16 x 16 pixels are more than --max_pixels 99"):
            load(tmp_path, channels=1, max_pixels=99)


class TestWithoutThePackages:
    def test_dicom(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(UserError, match=r"DICOM needs the package pydicom: pip install pydicom$"):
            containers.array_of(b"\0" * 128 + b"DICM", 100)

    def test_pages(self, tmp_path, monkeypatch):
        write_pages(tmp_path / "stack.tif", pages())
        monkeypatch.setitem(sys.modules, "tifffile", None)
        with pytest.raises(UserError, match=r"needs the package tifffile: pip install tifffile$"):
            load(tmp_path, pages="all")
        with pytest.raises(UserError, match=r"needs the package tifffile: pip install"):
            load(tmp_path, channels=4)


def test_an_array_of_axes_that_are_no_images():
    with pytest.raises(CorruptImageError, match="4 axes"):
        containers.channels_last(np.zeros((1, 2, 3, 4)), 3)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bits", [8, 16])
def test_fractions_of_every_precision_fill_the_range(kind, bits):
    values = np.linspace(0, 1, 9).astype(kind)
    np.testing.assert_array_equal(
        containers.whole(values, bits), np.rint(values.astype(np.float64) * (2**bits - 1)).astype(f"uint{bits}")
    )


def test_fractions_that_rounding_would_lose_are_no_image():
    np.testing.assert_array_equal(containers.whole(np.float32([0, 20.4, 255])), [0, 20, 255])  # a resized image
    np.testing.assert_array_equal(containers.whole(np.float32([0, 3, 7])), [0, 3, 7])
    for greatest in (1.0002, 10.5):
        with pytest.raises(CorruptImageError, match=f"fractions of up to {greatest}"):
            containers.whole(np.float32([0, 0.5, greatest]))
