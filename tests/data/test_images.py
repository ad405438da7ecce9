import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from d2ft_fl.data.images import BadImage, picture_of
from tests.data.files import picture, png


def encoded(image, format):
    """An image as ``datasets`` hands it over undecoded."""
    file = io.BytesIO()
    image.save(file, format)
    return {"bytes": file.getvalue(), "path": None}


def pixels(value):
    return np.asarray(picture_of(value))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK", "RGBA", "LA"])
def test_images_of_8_bits_are_what_pillow_makes_of_them(mode):
    image = picture(mode=mode)
    value = encoded(image, "tiff" if mode == "CMYK" else "png")
    assert np.array_equal(pixels(value), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["png", "tiff", "ppm"])
def test_16_bits_are_scaled_by_their_range(format):
    values = np.array([[0, 257, 65535], [128 * 257, 129, 128]], dtype=np.uint16)
    grey = pixels(encoded(Image.fromarray(values), format))[..., 0]
    assert grey.tolist() == [[0, 1, 255], [128, 1, 0]]  # 129 / 257 rounds up, 128 / 257 down


def test_32_bits_that_fit_16_are_read_as_these():
    values = np.array([[0, 65535]], dtype=np.int32)
    assert pixels(encoded(Image.fromarray(values), "tiff"))[..., 0].tolist() == [[0, 255]]


def test_floats_between_0_and_1_are_scaled():
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(encoded(Image.fromarray(values), "tiff"))[..., 0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    "values,message",
    [
        (np.array([[0, 70000]], dtype=np.int32), "mode 'I' .* between 0 and 70000"),
        (np.array([[-1, 7]], dtype=np.int32), "between -1 and 7"),
        (np.array([[0.0, 213.0]], dtype=np.float32), "mode 'F' holds floats between 0 and 213"),
        (np.array([[0.0, np.nan]], dtype=np.float32), "mode 'F'"),
    ],
)
def test_what_has_no_agreed_scale_is_refused(values, message):
    with pytest.raises(BadImage, match=message):
        picture_of(encoded(Image.fromarray(values), "tiff"))


@pytest.mark.parametrize("colour,inside,outside", [(0, 0, 255), (255, 255, 0)])
def test_a_picture_that_lives_in_its_opacity_stands_out(colour, inside, outside):
    opacity = np.zeros((4, 4), dtype=np.uint8)
    opacity[1:3, 1:3] = 255
    colours = np.full((4, 4, 3), colour, dtype=np.uint8)
    image = Image.fromarray(np.dstack([colours, opacity]))
    seen = pixels(encoded(image, "png"))
    assert (seen[1:3, 1:3] == inside).all()
    assert (seen[0] == outside).all()


def test_colours_below_transparency_stay():
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    assert np.array_equal(pixels(encoded(image, "png")), np.asarray(picture()))


def test_a_photo_is_turned_as_its_exif_data_say():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif)
    assert pixels({"bytes": file.getvalue(), "path": None}).shape == (4, 2, 3)


def bomb():
    """The PNG of an image that says it has 50,000 x 50,000 pixels."""
    data = bytearray(png())
    data[16:24] = (50_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


@pytest.mark.parametrize(
    "data,message",
    [
        (png(picture(size=64))[:-4000], "cannot be decoded"),
        (b"", "it is empty"),
        (bytes(500), "nothing but null bytes"),
        (b"hello, I am a text", "no image of a format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (png()[:20], "cannot be decoded|no image"),
        (bomb(), "cannot be decoded: .*decompression bomb"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=message) as error:
            picture_of({"bytes": data, "path": None})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value,message",
    [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "no such file"),
        ({"bytes": None, "path": "http://127.0.0.1:9/a.png"}, "is an address"),
    ],
)
def test_images_that_are_not_there(value, message):
    with pytest.raises(BadImage, match=message):
        picture_of(value)
