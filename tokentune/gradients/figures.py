"""Draws a diagnosis: bias and spread against the proportion, and the cosine by layer and by kind of module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokentune.gradients.report import share_of
from tokentune.settings.diagnose import named

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")  # Okabe and Ito's
MARKERS, DASHES = "osD^vPX", ("-", "--", ":", "-.")
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}  # the figures of `scripts/figures` have it too
BY_PROPORTION, BY_PART = "gradient_by_proportion.png", "gradient_by_part.png"


def draw_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws both pictures of a report (`gradients/report.py`) into a folder, which is made where it is missing."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, nor looked for
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in ((BY_PROPORTION, by_proportion), (BY_PART, by_part)):
            figure = draw(report)
            paths.append(folder / name)
            figure.savefig(paths[-1], dpi=160, metadata={"Software": None})
            pyplot.close(figure)
    return paths


def series(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The results of each strategy and correction, by its name in a legend."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        name = result["strategy"] + (f", corrected {result['correction']:g}" if result["correction"] else "")
        found.setdefault(name, []).append(result)
    return found


def looks(number: int) -> dict[str, Any]:
    """Of the line with this number: no two alike among as many as a picture can hold."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
    }


def by_proportion(report: dict[str, Any]) -> Any:
    """One draw's cosine, the bias of the mean, the spread of one draw, the effective batch, against the proportion.

    `answers` and `answers+0.1` stand at the share of tokens that they selected, with their names, beside the lines.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9.6, 7.4), layout="constrained", sharex=True)
    panels = {
        "Cosine of one draw (± 2 standard errors)": lambda r: r["whole"]["cosine"]["mean"],
        "Bias / norm of the full gradient": lambda r: r["whole"]["mean_of_draws"]["bias"],
        "Spread of one draw, √variance": lambda r: r["whole"]["variance"] ** 0.5,
        "Effective batch: rows of full training per row": lambda r: r["whole"]["effective_batch"],
    }
    lines, data = series(report["results"]), report["data"]
    for panel, (title, value) in zip(axes.flat, panels.items(), strict=True):
        for number, (name, results) in enumerate(lines.items()):
            answers = [result for result in results if isinstance(result["proportion"], str)]
            on_line = sorted((r for r in results if r not in answers), key=lambda result: result["proportion"])
            look = looks(number)
            panel.plot([r["proportion"] for r in on_line], [value(r) for r in on_line], label=name, **look)
            for result in answers:
                place = share_of(result, data), value(result)
                panel.plot(*place, **look | {"linestyle": "none", "markerfacecolor": "none", "clip_on": False})
                panel.annotate(result["proportion"], place, (7, -3), textcoords="offset points", fontsize=9)
            if title.startswith("Cosine"):
                xs, ys = zip(*((share_of(r, data), value(r)) for r in results), strict=True)
                errors = [2 * result["whole"]["cosine"]["standard_error"] for result in results]
                panel.errorbar(xs, ys, errors, fmt="none", ecolor=look["color"], capsize=2, linewidth=1)
        panel.set_title(title)
        panel.set_ylim(bottom=0)
    for panel in axes[1]:
        panel.set_xlabel("proportion of selected tokens")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(lines), 4))
    return figure


def by_part(report: dict[str, Any]) -> Any:
    """One draw's cosine by layer and by kind of module, at the proportion that is nearest to 0.3."""
    from matplotlib import pyplot

    nearest = min(report["results"], key=lambda result: abs(share_of(result, report["data"]) - 0.3))
    shown = nearest["proportion"]
    lines = series([result for result in report["results"] if result["proportion"] == shown])
    kinds = [part["kind"] for part in report["results"][0]["by_kind"]]
    figure, (layers, modules) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.2 + 0.25 * (len(lines) > 8)), layout="constrained", width_ratios=(1, 1.2), sharey=True
    )
    for number, (name, (result,)) in enumerate(lines.items()):
        by_layer = [(part["layer"], part["cosine"]["mean"]) for part in result["by_layer"]]
        if by_layer:
            layers.plot(*zip(*by_layer, strict=True), label=name, **looks(number))
        cosines = {part["kind"]: part["cosine"]["mean"] for part in result["by_kind"]}
        places = [place for place, kind in enumerate(kinds) if cosines[kind] is not None]
        shift = (number - (len(lines) - 1) / 2) * 0.6 / max(len(lines), 2)
        values = [cosines[kinds[place]] for place in places]
        modules.plot([place + shift for place in places], values, label=name, **looks(number) | {"linestyle": "none"})
    layers.set_title(f"By layer, at proportion {named(shown)}")
    layers.set_xlabel("layer")
    layers.set_ylabel("cosine of one draw to the full gradient")
    layers.xaxis.get_major_locator().set_params(integer=True)
    modules.set_title("By kind of module")
    modules.set_xticks(range(len(kinds)), [kind.replace("attention ", "") for kind in kinds], rotation=30, ha="right")
    layers.set_ylim(bottom=min(0.0, layers.get_ylim()[0]))
    handles = modules.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(lines), 4))
    return figure
