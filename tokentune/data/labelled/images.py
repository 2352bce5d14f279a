"""Images to be classified: folders of them, read by Pillow, and the pixels that a model's image processor makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from tokentune.data.formats.dataset_layout import subfolder_of_split
from tokentune.errors import UserError
from tokentune.models.pretrained import LOADING_ERRORS, MODEL_FLAG
from tokentune.sources import first_line, loading_error

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def holds_images(name_or_path: str | None) -> bool:
    """Whether a data set's name is a folder with image files at or below it."""
    folder = Path(name_or_path or "").expanduser()
    if not name_or_path or not folder.is_dir():
        return False
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def load_image_folder(folder: str, *, flag: str, role: str, split: str | None = None) -> Dataset:
    """The images of a folder with one subfolder per class, perhaps below one per split (train/cat/1.png).

    Read by the `imagefolder` of `datasets`, so `metadata.csv` works too. Without splits, all images of the folder.

    Args:
        role: "train", "validation" or "test": the split that is meant where none is named.
        split: the name of a subfolder.

    Raises:
        UserError: no such split, or several; nothing that can be read.
    """
    path = Path(folder).expanduser()
    below = subfolder_of_split(path, f"{flag} {folder}", role, split)
    try:
        splits = load_dataset("imagefolder", data_dir=str((below or path).resolve()))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{flag} {folder}: cannot be read as a folder of images: {first_line(error)}") from error
    if below is None and role in splits:
        return splits[role]
    if list(splits) != ["train"]:
        raise UserError(f"{flag} {folder}: no split {role!r}, only {', '.join(splits)}.")
    return splits["train"]


def load_image_processor(
    name: str, config: PreTrainedConfig, *, from_scratch: bool, trust_remote_code: bool = False
) -> Any:
    """What turns images into a model's pixels; with `from_scratch`, the model type's own where the folder has none.
    Raises UserError: there is none, or it needs a package that is not installed."""
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
        if not from_scratch or not isinstance(size, int) or type(config) not in IMAGE_PROCESSOR_MAPPING:
            raise loading_error(name, error, MODEL_FLAG) from error
        kind = IMAGE_PROCESSOR_MAPPING[type(config)]["pil"]
        return kind(size={"height": size, "width": size}, image_mean=[0.5] * channels, image_std=[0.5] * channels)


@dataclass(eq=False)
class ImageRows(torch.utils.data.Dataset):
    """Images as pixels, read when asked for: "pixel_values" (channels, height, width) and "labels"."""

    images: Any  # a column of undecoded images: `datasets.Image(decode=False)`
    numbers: Sequence[int | float] | None  # the labels; None for images to predict, whose label is then 0
    processor: Any
    channels: int  # 1 or 3
    where: str  # how messages begin

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = open_image(self.images[row], self.where, "L" if self.channels == 1 else "RGB")
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": 0 if self.numbers is None else self.numbers[row]}


def open_image(stored: dict[str, Any] | None, where: str, mode: str | None = None) -> Image.Image:
    """A stored image: its header read, or with one of Pillow's modes its pixels, turned upright.

    Args:
        where: how a message begins.

    Raises:
        UserError: Pillow cannot read it.
    """
    try:
        content = stored.get("bytes")
        image = Image.open(stored.get("path") if content is None else BytesIO(content))
        # Cameras store the sensor's pixels, and how the image has to be turned.
        return image if mode is None else ImageOps.exif_transpose(image).convert(mode)
    except (OSError, ValueError, SyntaxError, AttributeError) as error:
        path = (stored or {}).get("path")
        named, reason = f" {path}" if path else "", "no image" if stored is None else first_line(error)
        raise UserError(f"{where}: the image{named} cannot be read: {reason}. Repair or remove it.") from error
