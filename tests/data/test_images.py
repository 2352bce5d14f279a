"""Images as pixels: turned upright as their file says, and as pipelines turn them."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from PIL.ExifTags import Base

from tokentune.data.labelled.images import ImageRows, load_image_folder
from tokentune.errors import UserError


class Pixels:
    """An image processor that changes nothing."""

    def __call__(self, image: Image.Image, return_tensors: str) -> dict[str, np.ndarray]:
        return {"pixel_values": np.asarray(image)[None]}


def picture(orientation: int | None, kind: str) -> bytes:
    """Four by two pixels in two grey values that JPEG keeps apart, stored as a camera does that lay in this way."""
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    if orientation is not None:
        exif[Base.Orientation] = orientation
    content = BytesIO()
    Image.fromarray(pixels).convert("RGB").save(content, kind, exif=exif)
    return content.getvalue()


def rows_of(contents: list[bytes], channels: int = 3) -> ImageRows:
    stored = [{"bytes": content, "path": None} for content in contents]
    return ImageRows(stored, [0] * len(stored), Pixels(), channels, "--dataset_name_or_path x")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_images_are_upright(orientation: int | None, kind: str) -> None:
    content = picture(orientation, kind)
    expected = Dataset.from_dict({"image": [{"bytes": content, "path": None}]}).cast_column("image", ImageFeature())
    found = rows_of([content])[0]["pixel_values"]
    assert (found == np.asarray(expected[0]["image"])).all()
    assert found.shape == ((32, 16, 3) if orientation in (5, 6, 7, 8) else (16, 32, 3))
    corner = {None: (0, 0), 1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1)}
    assert found[corner.get(orientation, (-1, 0))].min() > 200  # the bright quarter


def test_grey_images_and_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(picture(6, "jpeg"))
    rows = load_image_folder(str(tmp_path), flag="--dataset_name_or_path", role="train")
    stored = rows.cast_column("image", ImageFeature(decode=False))["image"]
    assert ImageRows(stored, None, Pixels(), 1, "x")[0]["pixel_values"].shape == (32, 16)


def test_an_image_that_is_cut_short_is_named() -> None:
    with pytest.raises(UserError, match="--dataset_name_or_path x: the image cannot be read: "):
        rows_of([picture(6, "jpeg")[:-200]])[0]
