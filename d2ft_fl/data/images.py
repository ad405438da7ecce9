"""One image of a data set as 8-bit colours, whatever its file holds, or the reason why not.

Images of 8 bits a channel become RGB as Pillow converts them. Those of 16 bits, and floats between
0 and 1, are scaled by the range of their type, so that an image looks the same in every data set;
other ranges have no agreed scale and are refused. Pillow's own conversion would cut them off: all
white, or all black.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from d2ft_fl.errors import D2FTError, first_line

if TYPE_CHECKING:
    pass

DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # Pillow's modes of more than 8 bits
FLOAT = "F"
LARGEST_16 = 65535


class BadImage(D2FTError):
    """An image that cannot be used, with the reason.

    Attributes:
        lasting: Whether it is the image's own fault; else another attempt may read it.
    """

    lasting = True


def picture_of(value: Any) -> Image.Image | np.ndarray:
    """Return an image as RGB, 8 bits a channel.

    Args:
        value: What the data set holds: an array [height, width, channels], or the bytes or the
            path of an image file, as ``datasets.Image(decode=False)`` gives them.

    Raises:
        BadImage: When it is no image that can be used.
    """
    return value if isinstance(value, np.ndarray) else eight_bit(opened(value))


def opened(value: "dict[str, Any] | None") -> Image.Image:
    """Return a decoded image, turned as its EXIF data say.

    Raises:
        BadImage: When it cannot be decoded.
    """
    import datasets

    if value is None or (value["bytes"] is None and value["path"] is None):
        raise BadImage("there is no image")
    if value["bytes"] is None and "://" in value["path"]:
        raise BadImage(f"{value['path']!r} is an address, not a file")
    try:
        return datasets.Image().decode_example(value)
    except Image.UnidentifiedImageError:
        raise BadImage(_unidentified(value)) from None
    except FileNotFoundError:
        raise BadImage("there is no such file") from None
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        bad = BadImage(f"it cannot be decoded: {first_line(error)}")
        # Those of the system have a number, such as too many open files; Pillow's have none.
        bad.lasting = not isinstance(error, MemoryError) and getattr(error, "errno", None) is None
        raise bad from None


def _unidentified(value: dict[str, Any]) -> str:
    """Say of what kind a file is that is no image which Pillow knows."""
    try:
        data = value["bytes"]
        start = Path(value["path"]).read_bytes() if data is None else data
    except OSError:
        start = b""
    if not start.strip(b"\0"):
        return "it holds nothing but null bytes" if start else "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer of a file that Git LFS keeps elsewhere: run `git lfs pull`"
    return "it is no image of a format that Pillow reads"


def eight_bit(image: Image.Image) -> Image.Image:
    """Return an image as RGB, 8 bits a channel.

    Raises:
        BadImage: When its values have no agreed scale, or Pillow does not convert its mode.
    """
    if image.mode in DEEP or image.mode == FLOAT:
        return Image.fromarray(_scaled(image)).convert("RGB")
    try:
        colours = image.convert("RGB")
        if image.has_transparency_data and is_constant(colours):
            return _shape(image.convert("RGBA"))
        return colours
    except (ValueError, OSError) as error:
        raise BadImage(f"mode {image.mode!r} cannot be converted to RGB: {error}") from None


def _scaled(image: Image.Image) -> np.ndarray:
    """Return values of a grey image as uint8 [height, width], by the range of their type."""
    values = np.asarray(image)
    if image.mode == FLOAT:
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise BadImage(f"mode 'F' holds floats {_range(values)}; they are read between 0 and 1")
        return np.rint(values * 255).astype(np.uint8)
    if values.min() < 0 or values.max() > LARGEST_16:
        raise BadImage(
            f"mode {image.mode!r} holds whole numbers {_range(values)}; they are read up to "
            f"{LARGEST_16}"
        )
    return np.rint(values / 257).astype(np.uint8)  # 257 = 65535 / 255


def _range(values: np.ndarray) -> str:
    return f"between {values.min():g} and {values.max():g}"


def is_constant(image: Image.Image) -> bool:
    """Return whether all pixels of an image have one colour."""
    return all(low == high for low, high in image.getextrema())  # type: ignore[misc]


def _shape(image: Image.Image) -> Image.Image:
    """Return an image whose picture is its opacity, on the ground that it stands out from."""
    level = sum(low for low, _ in image.getextrema()[:3]) / 3  # type: ignore[misc]
    ground = Image.new("RGBA", image.size, "black" if level > 127 else "white")
    return Image.alpha_composite(ground, image).convert("RGB")
