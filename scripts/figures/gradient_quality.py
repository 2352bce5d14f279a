"""How far the selective gradient is from the full one, from `scripts/bench/gradient_quality.py`'s results.

    python scripts/figures/gradient_quality.py

Left and middle: tokens at random, with and without correction, against the proportion: bias of the mean gradient, and
how close one draw comes. Right: every strategy at one proportion, one draw with two standard errors, and the mean over
all draws, freed from what few draws leave of their variance.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from style import BLACK, BLUE, GREEN, RESULTS, VERMILION, command, pyplot, read_json, save

from tokentune.errors import UserError

GRADIENT_QUALITY = RESULTS / "gradient_quality.json"
SHOWN = 0.3  # the proportion of the right panel
CORRECTIONS = {
    0: ("the paper's gradient", BLUE, "o", "-"),
    0.5: ("half corrected", GREEN, "^", "--"),
    1: ("corrected", VERMILION, "s", "-"),
}


def draw(source: Path, output: Path) -> None:
    report = read_json(source)
    results = [result for result in report.get("results", []) if "LoRA" not in result["part"]]
    if not results:
        raise UserError(f"--input {source}: holds no results. Measure them: python scripts/bench/gradient_quality.py")
    figure, (bias, cosine, strategies) = pyplot.subplots(
        1, 3, figsize=(11.4, 4.6), layout="constrained", width_ratios=(1, 1, 1.25)
    )
    random = [result for result in results if result["strategy"] == "random"]
    of_bias = "bias / norm of the full gradient"
    against_proportion(bias, random, of_bias, lambda whole: (whole["mean_of_draws"]["bias"], 0.0))
    of_cosine = "cosine of one draw to the full gradient"
    against_proportion(
        cosine, random, of_cosine, lambda whole: (whole["cosine"]["mean"], 2 * whole["cosine"]["standard_error"])
    )
    figure.legend(*bias.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9)
    all_strategies(strategies, [result for result in results if result["proportion"] == SHOWN])
    asked = report["asked"]
    figure.suptitle(
        f"{asked['rows']} rows of up to {asked['max_length']} tokens, {asked['draws']} draws, a pretrained Llama of 5 "
        "million weights, all trained",
        fontsize=10.5,
    )
    save(figure, output)


def against_proportion(panel: Axes, results: list[dict[str, Any]], title: str, figure_of: Any) -> None:
    for correction, (label, color, marker, dash) in CORRECTIONS.items():
        chosen = sorted(
            (result for result in results if result["correction"] == correction),
            key=lambda result: result["proportion"],
        )
        if chosen:
            values, errors = zip(*(figure_of(result["whole"]) for result in chosen), strict=True)
            places = [result["proportion"] for result in chosen]
            panel.errorbar(places, values, errors, color=color, marker=marker, linestyle=dash, label=label, capsize=2)
    panel.set_xlim(left=0)
    panel.set_ylim(-0.02, 1.08 * max(panel.get_ylim()[1], 0.5))
    panel.set_xlabel("proportion of selected tokens")
    panel.set_title(title, fontsize=10.5)


def name_of(result: dict[str, Any]) -> str:
    draw = "" if result["draw"] is None else ", top" if result["draw"] == "top" else ", weighted"
    return result["strategy"] + draw + (f", corrected {result['correction']:g}" if result["correction"] else "")


def all_strategies(panel: Axes, results: list[dict[str, Any]]) -> None:
    """One line for each, the best draw on top."""
    ordered = sorted(results, key=lambda result: result["whole"]["cosine"]["mean"])
    places = range(len(ordered))
    wholes = [result["whole"] for result in ordered]
    errors = [2 * whole["cosine"]["standard_error"] for whole in wholes]
    cosines = [whole["cosine"]["mean"] for whole in wholes]
    of_mean = [whole["mean_of_draws"]["cosine_corrected"] for whole in wholes]
    options = {"fmt": "o", "color": BLUE, "capsize": 2, "label": "one draw"}
    panel.errorbar(cosines, places, xerr=errors, **options)
    known = [(cosine, place) for cosine, place in zip(of_mean, places, strict=True) if cosine is not None]
    panel.plot(*zip(*known, strict=True), "D", color=BLACK, markerfacecolor="none", label="mean of all draws")
    panel.set_yticks(places, [name_of(result) for result in ordered])
    panel.set_xlim(0, 1.05)
    panel.set_title(f"cosine to the full gradient, proportion {SHOWN:g}", fontsize=10.5)
    panel.legend(loc="upper left", fontsize=9)


if __name__ == "__main__":
    command(__doc__, GRADIENT_QUALITY, draw, "gradient_quality.png")
