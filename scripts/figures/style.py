"""What the figures share: colours, names, reading results, saving a picture. Not a command.

The colours are Okabe and Ito's (told apart with any common kind of colour blindness); lines differ in marker and dash
too. Sizes are for a picture that a README shows some 830 pixels wide.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokentune.errors import UserError
from tokentune.gradients.figures import COLORS, STYLE

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "bench" / "results"
STEP_CPU = RESULTS / "step_cpu.json"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS
GREY = "#777777"


class Look(NamedTuple):
    name: str
    color: str
    marker: str
    dash: str


LOOKS = {
    "full": Look("plain training", BLACK, "s", "-"),
    "full_chunked": Look("plain, loss in chunks", GREY, "s", ":"),
    "checkpointing": Look("gradient checkpointing", ORANGE, "D", "--"),
    "checkpointing_chunked": Look("gradient checkpointing, loss in chunks", SKY, "D", "-"),
    "sequence_chunks": Look("sequence in chunks, exact", BLACK, "x", ":"),
    "tokentune": Look("TokenTune", BLUE, "o", "-"),
    "tokentune_checkpointing": Look("TokenTune + checkpointing", GREEN, "^", "-"),
    "tokentune_segments": Look("TokenTune, lowest memory", VERMILION, "v", ":"),
    "tokentune_offload": Look("TokenTune + checkpointing, offloaded", PURPLE, "P", ":"),
}
TRAINED = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}

pyplot.rcParams.update(STYLE)


def command(doc: str, source: Path, draw: Callable[[Path, Path], None], picture: str) -> None:
    """The whole of a figure's command: `--input` (default: the committed results), `--output`, and its errors.

    draw: called with both paths; raises UserError where the input does not hold what the figure shows.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=source)
    parser.add_argument("--output", type=Path, default=HERE / picture, help="PNG file to write")
    options = parser.parse_args()
    try:
        if not options.input.exists():
            raise UserError(f"--input {options.input}: there is no such file or folder")
        draw(options.input, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written: {options.output}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"--input {path}: cannot be read as JSON ({error})") from error


def rows_of(path: Path, *suites: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of these suites in a file of `scripts/bench/step.py`, without those that ran out of memory; and all."""
    report = read_json(path)
    rows = [row for row in report.get("rows", []) if row.get("suite") in suites and "error" not in row]
    if not rows:
        names = " or ".join(suites)
        raise UserError(f"--input {path}: has no rows of suite {names}. Measure them: bash scripts/bench/cpu.sh")
    return rows, report


def panels(names: Iterable[str], *, height: float = 4.2, **options: Any) -> tuple[Figure, dict[str, Axes]]:
    """One panel per name, side by side."""
    names = list(names)
    width = 8.6 if len(names) > 1 else 7.2
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(width, height), squeeze=False, layout="constrained", **options
    )
    return figure, dict(zip(names, axes[0], strict=True))


def describe(row: dict[str, Any]) -> str:
    """The setting of a row, for a figure's subtitle."""
    return (
        f"Llama, hidden size {row['hidden_size']:,}, {row['layers']} layers, "
        f"{row['key_value_heads']} of {row['heads']} key-value heads, "
        f"{row['batch']} x {row['length']:,} tokens, {row['dtype']}"
    )


def device_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['versions']['torch']}"


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})  # no version: the same picture from the same results
    pyplot.close(figure)
