"""Images of 1 to 16 channels and of 8 or 16 bits: no bit is lost, and their mean and std are measured."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.deep import png16
from helpers.images import file_bytes, picture
from sssd_zoo.configs import DataConfig, SettingsError
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.images import decode
from sssd_zoo.data.loading import load_images
from sssd_zoo.data.opening import Encoded
from sssd_zoo.data.pixels import PixelFormat, shown
from sssd_zoo.data.streaming import load_streaming
from sssd_zoo.errors import UserError

SIDE = 12


def random16(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read(data, channels, bits, size=SIDE):
    return decode(Encoded("it", data, None), size, pixels=PixelFormat(channels, bits)).transpose(1, 2, 0)


@pytest.fixture
def arrays(tmp_path):
    """A folder of six arrays of five channels, and their values [6, H, W, 5]."""
    values = random16(6, SIDE, SIDE, 5) // 5
    for number, image in enumerate(values):
        np.save(tmp_path / f"{number}.npy", image if number % 2 else image.transpose(2, 0, 1))
    return tmp_path, values


class TestNothingIsLost:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_png_of_16_bits(self, channels):
        values = random16(SIDE, SIDE, channels)
        np.testing.assert_array_equal(read(png16(values), channels, 16), values)

    def test_tiff_of_16_bits(self):
        values = random16(SIDE, SIDE)
        np.testing.assert_array_equal(read(file_bytes(Image.fromarray(values), "TIFF"), 1, 16)[..., 0], values)

    @pytest.mark.parametrize("channels", [1, 2, 5, 16])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_arrays(self, channels, dtype):
        values = random16(SIDE, SIDE, channels).astype(dtype)
        bits = 8 * values.itemsize
        np.testing.assert_array_equal(read(npy(values), channels, bits), values)
        np.testing.assert_array_equal(read(npy(values.transpose(2, 0, 1)), channels, bits), values)
        np.testing.assert_array_equal(
            read(npy(values.astype(np.dtype(dtype).newbyteorder(">"))), channels, bits), values
        )

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_8_bits_in_8_and_in_16(self, mode):
        image = picture(0, SIDE).convert(mode)
        values = np.asarray(image).reshape(SIDE, SIDE, -1)
        found = read(file_bytes(image), values.shape[2], 8)
        np.testing.assert_array_equal(found, values)
        np.testing.assert_array_equal(read(file_bytes(image), values.shape[2], 16), values.astype(int) * 257)

    def test_fractions_are_kept_to_16_bits(self):
        values = np.random.default_rng(0).random((SIDE, SIDE, 6))
        values[0, 0, 0] = np.nan
        found = read(npy(values.astype(np.float32)), 6, 16) / 65535
        assert found[0, 0, 0] == 0
        np.testing.assert_allclose(found, np.nan_to_num(values), atol=1e-5)

    def test_resizing_is_that_of_rgb(self):
        image = picture(0, 40, 30)
        as_rgb = decode(Encoded("it", file_bytes(image), None), SIDE).transpose(1, 2, 0).astype(int)
        as_stored = read(file_bytes(image.convert("RGBA")), 4, 8)
        assert np.abs(as_stored[..., :3] - as_rgb).max() <= 1
        assert (as_stored[..., 3] == 255).all()


class TestChannels:
    def test_grey_is_repeated_and_colour_becomes_luma_and_alpha_is_dropped(self):
        grey, colour = picture(0, SIDE).convert("L"), picture(1, SIDE)
        np.testing.assert_array_equal(read(file_bytes(grey), 3, 8), np.stack([np.asarray(grey)] * 3, -1))
        luma = np.asarray(colour) @ [0.299, 0.587, 0.114]
        assert np.abs(read(file_bytes(colour), 1, 8)[..., 0] - luma).max() <= 0.5
        np.testing.assert_array_equal(read(file_bytes(colour.convert("RGBA")), 3, 8), np.asarray(colour))
        np.testing.assert_array_equal(read(file_bytes(grey.convert("LA")), 1, 8)[..., 0], np.asarray(grey))
        np.testing.assert_array_equal(read(file_bytes(grey.convert("LA")), 3, 8), np.stack([np.asarray(grey)] * 3, -1))

    @pytest.mark.parametrize(
        ("data", "channels", "bits", "message"),
        [
            (npy(random16(SIDE, SIDE, 5)), 4, 16, "it has 5 channels, and --channels asks for 4"),
            (npy(random16(SIDE, SIDE, 4)), 3, 16, "it has 4 channels, and --channels asks for 3"),
            (npy(random16(SIDE, SIDE, 4)), 1, 16, "it has 4 channels, and --channels asks for 1"),
            (file_bytes(picture(0)), 4, 8, "it has 3 channels, and --channels asks for 4"),
            (npy(random16(SIDE, SIDE, 4)), 4, 8, "16 bits per channel.*give --bits 16"),
            (npy(random16(SIDE)), 1, 16, "no image"),
            (npy(np.full((4, 4), -5)), 1, 16, "values run from -5 to 0"),
            (npy(np.full((4, 4), 70000.0)), 1, 16, "values run from 0 to 70000"),
            (npy(np.zeros((4, 4), "U3")), 1, 16, "values are of the type <U3"),
            (b"\x93NUMPY\x01\x00junk", 1, 16, "header is damaged"),
            (npy(random16(SIDE, SIDE, 4))[:-9], 4, 16, "."),
            (png16(random16(SIDE, SIDE, 2)), 2, 16, "grey with alpha in 16 bits"),
        ],
    )
    def test_others_are_corrupt_for_a_reason(self, data, channels, bits, message):
        with pytest.raises(CorruptImageError, match=message):
            read(data, channels, bits)

    def test_an_array_of_more_pixels_than_allowed(self):
        with pytest.raises(CorruptImageError, match="max_pixels 2"):
            decode(Encoded("it", npy(random16(20, 20)), None), SIDE, 2, PixelFormat(1, 16))


class TestLoading:
    def test_arrays_in_memory_and_not(self, arrays):
        folder, values = arrays
        for in_memory in (True, False):
            data = load_images(DataConfig(data=str(folder), channels=5, in_memory=in_memory, workers=0), progress=False)
            assert (data.size, data.pixels, data.channels) == (SIDE, PixelFormat(5, 16), 5)
            images = torch.cat([batch for _, batch in data.batches(torch.arange(6).split(4))])
            np.testing.assert_array_equal(images.numpy(), values.transpose(0, 3, 1, 2))
            mean, std = data.statistics
            np.testing.assert_allclose(mean, (values / 65535).mean((0, 1, 2)), rtol=1e-4)
            np.testing.assert_allclose(std, (values / 65535).std((0, 1, 2)), rtol=1e-4)

    def test_a_stream(self, arrays):
        folder, values = arrays
        data = load_streaming(DataConfig(data=str(folder), channels=5, streaming=True), progress=False)
        assert data.pixels == PixelFormat(5, 16)
        np.testing.assert_allclose(data.statistics.mean, (values / 65535).mean((0, 1, 2)), rtol=1e-4)
        _, images = next(data.batches(6, seed=0, epoch=0))
        found = {image.tobytes() for image in images.numpy()}
        assert found == {np.ascontiguousarray(image).tobytes() for image in values.transpose(0, 3, 1, 2)}

    def test_rgb_of_8_bits_is_what_it_always_was(self, folder_of_images):
        plain, asked = (
            load_images(DataConfig(data=str(folder_of_images), channels=channels), progress=False)
            for channels in (None, 3)
        )
        assert asked.pixels is None
        assert asked.statistics is None
        assert asked.identity == plain.identity
        assert torch.equal(asked.gather(torch.arange(48)), plain.gather(torch.arange(48)))

    def test_a_deep_image_among_shallow_ones(self, tmp_path):
        for number in range(3):
            (tmp_path / f"{number}.png").write_bytes(file_bytes(picture(number).convert("L")))
        (tmp_path / "deep.png").write_bytes(png16(random16(12, 12, 1)))
        assert load_images(DataConfig(data=str(tmp_path), channels=1), progress=False).pixels == PixelFormat(1, 16)
        with pytest.raises(UserError, match=r"deep\.png: it has 16 bits per channel"):
            load_images(DataConfig(data=str(tmp_path), channels=1, bits=8), progress=False)

    def test_a_constant_channel_has_a_std_of_1(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((4, 4, 2), np.uint8))
        data = load_images(DataConfig(data=str(tmp_path), channels=2), progress=False)
        assert data.statistics == ((0.0, 0.0), (1.0, 1.0))

    def test_arrays_need_channels(self, arrays):
        with pytest.raises(UserError, match=r"6 \.npy files \(arrays: give --channels"):
            load_images(DataConfig(data=str(arrays[0])), progress=False)

    def test_the_first_ten_problems_are_named(self, tmp_path):
        for number in range(13):
            (tmp_path / f"{number:02}.png").write_bytes(b"no image")
        with pytest.raises(UserError) as error:
            load_images(DataConfig(data=str(tmp_path)), progress=False)
        assert "13 images" in str(error.value)
        assert "09.png: it is not an image" in str(error.value)
        assert "10.png" not in str(error.value)
        assert "and 3 more" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"bits": 16}, {"channels": 17}, {"channels": 3, "bits": 12}])
def test_settings_that_contradict_one_another(settings):
    with pytest.raises(SettingsError):
        DataConfig(data="x", **settings)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_what_is_shown_to_a_person(channels):
    images = torch.from_numpy(random16(3, channels, 8, 8) // 50)
    values = images.to(torch.float32) / 65535
    found = shown(images, values.mean((0, 2, 3)).tolist(), values.std((0, 2, 3)).tolist())
    assert (found.shape, found.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert found.float().std() > 40
