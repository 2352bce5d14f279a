"""Loss against the proportion of selected tokens, from the summaries of fine-tuning runs.

    python scripts/figures/loss_by_proportion.py --input models --output loss_by_proportion.png

Reads every `training_summary.json` below a folder. Runs of different models, data or ways to train are different lines;
a run without TokenTune stands at 100 %, as a hollow mark. The validation loss where all runs have one, else the last
training loss.
"""

from pathlib import Path
from typing import Any

from style import BLACK, BLUE, GREEN, HERE, VERMILION, command, panels, read_json, save

from tokentune.errors import UserError
from tokentune.file_names import SUMMARY_NAME
from tokentune.sampling.schedule import parse_prefix_length

LINES = ((BLUE, "o", "-"), (GREEN, "^", "--"), (VERMILION, "v", ":"), (BLACK, "s", "-."))


def draw(source: Path, output: Path) -> None:
    runs = [read_json(path) for path in sorted(source.rglob(SUMMARY_NAME))]
    points = [(kind(run), *proportion(run), run) for run in runs if proportion(run) is not None]
    if not points:
        raise UserError(f"--input {source}: holds no {SUMMARY_NAME} of a run with a proportion: fine-tune first")
    validated = all(run["validation_loss"] for *_, run in points)
    figure, axes = panels(["loss"])
    panel = axes["loss"]
    for (color, marker, dash), name in zip(LINES, sorted({point[0] for point in points}), strict=False):
        line = sorted((share, selective, loss(run, validated)) for k, share, selective, run in points if k == name)
        drawn = [(100 * share, value) for share, selective, value in line if selective]
        if drawn:
            panel.plot(
                *zip(*drawn, strict=True), color=color, marker=marker, linestyle=dash, label=f"{name}, TokenTune"
            )
        plain = [(100 * share, value) for share, selective, value in line if not selective]
        if plain:
            look = {"marker": marker, "markersize": 9, "markerfacecolor": "white", "linestyle": "none"}
            panel.plot(*zip(*plain, strict=True), color=color, label=f"{name}, plain", **look)
    if validated:
        base = points[0][-1]["validation_loss"]["base"]
        panel.axhline(base, color="#999999", linewidth=1, linestyle="--", label="before training")
    panel.set_xlabel("selected tokens, % of the sequence")
    panel.set_ylabel(("validation" if validated else "last training") + " loss, nats per token")
    panel.set_xlim(0, 104)
    panel.legend()
    save(figure, output)


def kind(run: dict[str, Any]) -> str:
    settings = run["settings"]
    return "QLoRA" if settings["qlora"] else "LoRA" if settings["lora"] else "all weights"


def proportion(run: dict[str, Any]) -> tuple[float, bool] | None:
    """(share of the tokens, whether they were selected); None where a number of tokens was asked for."""
    settings = run["settings"]
    if not settings["tokentune"]:
        return 1.0, False
    selected = parse_prefix_length(str(settings["prefix_length"]))
    return (selected, True) if isinstance(selected, float) else None


def loss(run: dict[str, Any], validated: bool) -> float:
    return run["validation_loss"]["final"] if validated else run["loss"]["last"]


if __name__ == "__main__":
    command(__doc__, HERE.parents[1] / "models", draw, "loss_by_proportion.png")
