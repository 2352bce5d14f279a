"""Scores of the five lm-eval tasks, the base and every fine-tuned model side by side.

    python scripts/figures/evaluation.py --input results --output evaluation.png

Reads a folder that `scripts/eval/lm_harness_*.sh` filled: <model>/<task>_<shots>shot.json and lm-eval's date-stamped
files below it, of which the newest of each task counts. A task has one bar per model that has a score for it.
"""

import re
from pathlib import Path

from matplotlib import pyplot
from style import BLACK, BLUE, GREEN, HERE, VERMILION, command, read_json, save

from tokentune.errors import UserError

COLORS = {"all weights": BLUE, "LoRA": GREEN, "QLoRA": VERMILION}  # pale without TokenTune, full with it
METRICS = {  # task -> the leaderboard's metric, and what the axis calls the task
    "arc_challenge": ("acc_norm,none", "ARC-challenge"),
    "hellaswag": ("acc_norm,none", "HellaSwag"),
    "mmlu": ("acc,none", "MMLU"),
    "truthfulqa_mc2": ("acc,none", "TruthfulQA"),
    "winogrande": ("acc,none", "WinoGrande"),
}
ANY_METRIC = ("acc_norm,none", "acc,none", "exact_match,none")


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
    """Folder of a model -> task -> (score, standard error), both shares.

    Raises:
        UserError: no results in the folder, or a task without a known metric.
    """
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    dates: dict[tuple[str, str], str] = {}
    for path in sorted(folder.rglob("*.json")):
        date = re.search(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$", path.name)
        if date is None:
            continue
        report = read_json(path)
        model = path.relative_to(folder).parts[0]
        for task in tasks_of(report):
            if dates.get((model, task), "") < date[1]:
                dates[model, task] = date[1]
                scores.setdefault(model, {})[task] = score(report["results"][task], task, path)
    if not scores:
        raise UserError(f"--input {folder}: holds no lm-eval results. Make some: bash scripts/eval/lm_harness_arc.sh")
    return scores


def run_names(folders: list[str]) -> dict[str, str]:
    """Folder -> what a figure calls it. A run's folder is <model>-<data>[-lora][-qlora][-tokentune-<selected>], and a
    base's name is one that the others' begin with."""
    base = next((name for name in folders if all(f"{other}-".startswith(f"{name}-") for other in folders)), None)
    names = {}
    for folder in folders:
        lora, qlora, selected = re.search(r"(-lora)?(-qlora)?(?:-tokentune-([^-]+))?$", folder).groups()
        parts = ["QLoRA" if qlora else "LoRA"] if lora or qlora else []
        parts += [f"TokenTune, {selected}"] if selected else []
        plain = folder if base in (None, folder) else "all weights"
        names[folder] = " + ".join(parts) or plain
    return names


def order(name: str) -> tuple[int, int, str]:
    """Base first; then all weights, LoRA, QLoRA, each without TokenTune before with it."""
    way = next((at for at, way in enumerate(COLORS, 1) if name.split(" + ")[0] == way), 0)
    if name.startswith("TokenTune"):
        way = 1
    return way, int("TokenTune" in name), name


def color_of(name: str) -> str:
    way = order(name)[0]
    return list(COLORS.values())[way - 1] if way else BLACK


def tasks_of(report: dict) -> list[str]:
    """What was asked for: groups (MMLU) without the tasks that they consist of."""
    members = {task for tasks in report.get("group_subtasks", {}).values() for task in tasks}
    return [task for task in report["results"] if task not in members]


def score(results: dict, task: str, path: Path) -> tuple[float, float]:
    wanted = METRICS[task][:1] if task in METRICS else ANY_METRIC
    name = next((name for name in wanted if name in results), None)
    if name is None:
        raise UserError(f"--input {path}: task {task} has none of the metrics {', '.join(wanted)}")
    error = results.get(name.replace(",", "_stderr,"))
    return results[name], error if isinstance(error, float) else 0.0


if __name__ == "__main__":
    command(__doc__, HERE.parents[1] / "results", draw, "evaluation.png")
