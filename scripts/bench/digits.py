"""scikit-learn's digits as an image folder, and a small ViT's configuration to train on them from scratch.

    python scripts/bench/digits.py --output ./digits

Writes the 1,797 real 8 x 8 images as PNG, `{train,validation}/<digit>/<number>.png`, every fifth one for validation,
and `tiny-vit`: four layers, 16 patches and the class token, without weights.
"""

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTImageProcessorPil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the images and the configuration")
    folder = parser.parse_args().output
    write_digits(folder)
    write_vit(folder / "tiny-vit")
    print(f"written: {folder}")


def write_digits(folder: Path) -> None:
    """The images, one folder for each digit."""
    digits = load_digits()
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "validation" if number % 5 == 4 else "train"
        path = folder / split / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = (image * 255 / 16).round().astype("uint8")  # from 0 to 16
        Image.fromarray(grey).convert("RGB").save(path)


def write_vit(folder: Path) -> None:
    ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        architectures=["ViTForImageClassification"],
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=False).save_pretrained(folder)


if __name__ == "__main__":
    main()
