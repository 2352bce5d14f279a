"""lm-evaluation-harness's result files: which of them count, and what they say. Not a command.

The evaluation scripts leave <model>/<task>_<shots>shot_<date>.json in the folder of results, for a merged run
<run folder>/merged/... . The harness never overwrites a file: of each model and task the one with the newest date
counts. Both are told by the names, so that the files can be copied about.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tokentune.errors import UserError

METRICS = {  # task -> the leaderboard's metric, and what a reader knows the task as
    "arc_challenge": ("acc_norm,none", "ARC-challenge"),
    "hellaswag": ("acc_norm,none", "HellaSwag"),
    "mmlu": ("acc,none", "MMLU"),
    "truthfulqa_mc2": ("acc,none", "TruthfulQA"),
    "winogrande": ("acc,none", "WinoGrande"),
}
ANY_METRIC = ("acc_norm,none", "acc,none", "exact_match,none")
WAYS = ("all weights", "LoRA", "QLoRA")  # what is trained, as `run_names` has it


class Result(NamedTuple):
    """One model's score for one task.

    Attributes:
        score: a share, 0 to 1.
        stderr: its standard error, a share; None where the harness gives none.
        metric: the harness's name of it, without its filter: acc, acc_norm.
        shots: examples in the prompt; None where the file does not say.
        limit: questions asked, or their share, where not all of them were; None: all.
        path: the file.
    """

    score: float
    stderr: float | None
    metric: str
    shots: int | None
    limit: float | None
    path: Path


def read_results(folder: Path, flag: str = "--input") -> dict[str, dict[str, Result]]:
    """Name of a model's folder -> task -> result. A merged run goes by the name of its run folder.

    Args:
        flag: that gave the folder, for what is said of it.

    Raises:
        UserError: no results in the folder, a file that cannot be read, or a task without a known metric.
    """
    newest: dict[tuple[str, str], str] = {}
    results: dict[str, dict[str, Result]] = {}
    for path in sorted(folder.rglob("*.json")):
        date = re.search(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$", path.name)
        if date is None:
            continue
        report = _read(path, flag)
        model = path.relative_to(folder).parts[0]
        for task in tasks_of(report):
            if newest.get((model, task), "") < date[1]:
                newest[model, task] = date[1]
                results.setdefault(model, {})[task] = result_of(report, task, path, flag)
    if not results:
        raise UserError(f"{flag} {folder}: holds no lm-eval results. Make some: bash scripts/eval/lm_harness_arc.sh")
    return results


def _read(path: Path, flag: str) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and isinstance(report.get("results"), dict):
            return report
        reason = "it has no results"
    except (ValueError, OSError) as error:
        reason = str(error)
    raise UserError(f"{flag}: {path} is no result file of lm-eval ({reason}).\nDelete it, and run that task again.")


def tasks_of(report: dict[str, Any]) -> list[str]:
    """What was asked for: groups (MMLU) without the tasks that they consist of."""
    members = {task for tasks in report.get("group_subtasks", {}).values() for task in tasks}
    return [task for task in report["results"] if task not in members]


def result_of(report: dict[str, Any], task: str, path: Path, flag: str = "--input") -> Result:
    """The result of one task in a file's content. Raises UserError where it has no known metric."""
    figures = report["results"][task]
    wanted = METRICS[task][:1] if task in METRICS else ANY_METRIC
    name = next((name for name in wanted if name in figures), None)
    if name is None:
        raise UserError(f"{flag} {path}: task {task} has none of the metrics {', '.join(wanted)}")
    stderr = figures.get(name.replace(",", "_stderr,"))  # "N/A" where the harness has none
    shots = report.get("n-shot", {}).get(task)
    if shots is None and (named := re.search(r"_(\d+)shot_", path.name)):  # of a group it tells those of its tasks
        shots = int(named[1])
    return Result(
        score=figures[name],
        stderr=stderr if isinstance(stderr, float) else None,
        metric=name.partition(",")[0],
        shots=shots,
        limit=report.get("config", {}).get("limit"),
        path=path,
    )


# --- what the models are called ---------------------------------------------------------------------------------------


def run_names(folders: list[str]) -> dict[str, str]:
    """Folder -> what a figure or table calls it.

    A run's folder is <model>-<data>[-lora][-qlora][-tokentune-<selected>], and a base's name one that the others' begin
    with.
    """
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
    way = next((at for at, way in enumerate(WAYS, 1) if name.split(" + ")[0] == way), 0)
    if name.startswith("TokenTune"):
        way = 1
    return way, int("TokenTune" in name), name
