"""Scores of the five lm-eval tasks, the base and every fine-tuned model side by side.

    python scripts/figures/evaluation.py --input results --output evaluation.png

Reads a folder that `scripts/eval/lm_harness_*.sh` filled: <model>/<task>_<shots>shot.json and lm-eval's date-stamped
files below it, of which the newest of each task counts. A task has one bar per model that has a score for it.
"""

import sys
from pathlib import Path

from matplotlib import pyplot
from style import BLACK, BLUE, GREEN, HERE, VERMILION, command, save

sys.path.append(str(HERE.parent / "eval"))

from lm_eval_results import METRICS, WAYS, order, read_results, run_names

COLORS = dict(zip(WAYS, (BLUE, GREEN, VERMILION), strict=True))  # pale without TokenTune, full with it


def draw(source: Path, output: Path) -> None:
    names = run_names(list(found := read_scores(source)))
    scores = {names[folder]: found[folder] for folder in sorted(found, key=lambda folder: order(names[folder]))}
    models = list(scores)
    present = {task for of_model in scores.values() for task in of_model}
    tasks = [task for task in METRICS if task in present] + sorted(present - set(METRICS))
    width = 0.8 / len(models)
    figure, axes = pyplot.subplots(figsize=(8.6, 4.2), layout="constrained")
    for at, model in enumerate(models):
        places = [(i + (at - (len(models) - 1) / 2) * width, t) for i, t in enumerate(tasks) if t in scores[model]]
        values = [100 * scores[model][task][0] for _, task in places]
        errors = [100 * scores[model][task][1] for _, task in places]
        look = {"color": color_of(model), "alpha": 1 if "TokenTune" in model or order(model)[0] == 0 else 0.45}
        bars = axes.bar([x for x, _ in places], values, 0.92 * width, label=model, **look)
        axes.errorbar([x for x, _ in places], values, errors, fmt="none", ecolor="#222222", elinewidth=0.8)
        if len(models) <= 4:
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=5, fontsize=8)
    axes.set_xticks(range(len(tasks)), [METRICS[task][1] if task in METRICS else task for task in tasks])
    axes.set_ylabel("score, % (bars: standard error)")
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 112 if len(models) <= 4 else 100)
    figure.legend(loc="outside lower center", ncols=min(3, len(models)), fontsize=9)
    save(figure, output)


def read_scores(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Folder of a model -> task -> (score, standard error), both shares. Raises UserError as `read_results`."""
    results = read_results(folder)
    return {model: {task: (r.score, r.stderr or 0.0) for task, r in of.items()} for model, of in results.items()}


def color_of(name: str) -> str:
    way = order(name)[0]
    return list(COLORS.values())[way - 1] if way else BLACK


if __name__ == "__main__":
    command(__doc__, HERE.parents[1] / "results", draw, "evaluation.png")
