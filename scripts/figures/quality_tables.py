"""The tables of `scripts/bench/selection_quality.py` and `selection_quality_encoders.py`: headers and rows.

Not a command: `scripts/docs.py` puts them into the docs.
"""

from typing import Any

BYTES_IN_MIB = 2**20
Table = tuple[list[str], list[list[str]]]
MAIN_ARM, SHARE = "one epoch", 0.3
TRAINED = {"full": "all weights", "lora": "LoRA"}
BASELINES = {
    "full": "full training",
    "full, smaller micro-batch": "full, the bytes of TokenTune (micro-batch of 4)",
    "full, checkpointing": "full, gradient checkpointing",
    "full, equal time": "full, fewer steps: the time of TokenTune",
    "full, equal bytes and time": "full, micro-batch of 4 and fewer steps: bytes and time of TokenTune",
}
ENCODER_TASKS = {
    "sst2": "SST-2, accuracy, 6 tokens",
    "rte": "RTE, accuracy, 16 tokens",
    "wnut17": "WNUT-17, entity F1, 30 %",
    "paraphrase": "paraphrase pairs, accuracy, 16 tokens",
}


def strategies(report: dict[str, Any]) -> Table:
    """At 30 %: each method's loss, its difference to random tokens, and what it costs."""
    rows = []
    for trained, name in TRAINED.items():
        found = [row for row in report["comparison"] if row["trained"] == trained and row["arm"] == MAIN_ARM]
        base = next((run["base_loss"] for run in report["runs"] if run["trained"] == trained), None)
        if base is not None:
            rows.append([name, "no training", f"{base:.3f}", "", "", "", "", ""])
        shown = [row for row in found if row["proportion"] in (None, SHARE)]
        for row in sorted(shown, key=lambda row: (row["method"] not in BASELINES, row["method"] != "random")):
            label = BASELINES.get(row["method"], f"**{row['method']}**")
            rows.append([name, label, loss_of(row), *against_random(row), *costs(row)])
    header = ["trained", "tokens", "validation loss", "minus random's", "beyond two standard errors"]
    return [*header, "kept for backward", "work of a step", "time of a step"], rows


def equal_cost(report: dict[str, Any]) -> Table:
    """At 30 %: the usual strategies, beside full training in their time and bytes."""
    methods = ("full", "full, equal time", "full, equal bytes and time", "random", "supervised", "gradient")
    wanted = {(trained, method): None for trained in TRAINED for method in methods}
    for row in report["comparison"]:
        if row["arm"] == MAIN_ARM and row["proportion"] in (None, SHARE):
            wanted[row["trained"], row["method"]] = row
    names = BASELINES | {method: f"**TokenTune, `--selection {method}`**" for method in methods[3:]}
    rows = []
    for method in methods:
        losses = [loss_of(wanted[trained, method]) for trained in TRAINED]
        rows.append([names[method], *losses, costs(wanted["full", method])[0]])
    losses = [f"validation loss, {name}" for name in TRAINED.values()]
    return ["", *losses, "kept for backward, all weights"], rows


def proportions(report: dict[str, Any]) -> Table:
    """Losses by proportion, for methods that were run at several."""
    shares = sorted({row["proportion"] for row in report["comparison"] if row["proportion"]})
    groups: dict[tuple[str, str], dict[float, dict]] = {}
    for row in report["comparison"]:
        if row["arm"] == MAIN_ARM and row["proportion"]:
            groups.setdefault((row["trained"], row["method"]), {})[row["proportion"]] = row
    rows = []
    for (trained, method), found in sorted(groups.items(), key=lambda item: item[0][0] != "full"):
        if len(found) > 1:
            cells = [loss_of(found[share]) if share in found else "" for share in shares]
            rows.append([TRAINED[trained], BASELINES.get(method, f"**{method}**"), *cells])
    return ["trained", "tokens", *(f"{share:.0%}" for share in shares)], rows


def corrections(report: dict[str, Any]) -> Table:
    """The gradient correction: in every setting that was tried, minus the same selection without it."""
    rows = []
    for row in report["comparison"]:
        if "to_uncorrected" in row:
            plain, _, power = row["method"].partition(", correction ")
            setting = [TRAINED[row["trained"]], row["arm"], plain, f"{row['proportion']:.0%}", power]
            rows.append([*setting, loss_of(row), gap(row["to_uncorrected"]), verdict(row["to_uncorrected"])])
    header = ["trained", "run", "tokens", "proportion", "correction", "validation loss"]
    return [*header, "minus uncorrected", "beyond two standard errors"], rows


def gradients(report: dict[str, Any]) -> Table:
    """`scripts/bench/gradient_quality.py`: each strategy's gradients against the one over all tokens."""
    rows = []
    for result in sorted(report["results"], key=lambda row: ("LoRA" in row["part"], row["proportion"] != SHARE)):
        whole, mean = result["whole"], result["whole"]["mean_of_draws"]
        draw = {"proportional": ", weighted", "top": ", top"}.get(result["draw"], "")
        cosine = whole["cosine"]
        rows.append(
            [
                "LoRA" if "LoRA" in result["part"] else "all weights",
                f"{result['proportion']:.0%}",
                f"{result['strategy']}{draw}",
                f"{result['correction']:g}",
                f"{cosine['mean']:.3f} ± {cosine['standard_error']:.3f}",
                f"{min(mean['cosine_corrected'], 1.0):.2f}",  # an estimate, which may pass it
                f"{mean['bias']:.2f}",
                f"{whole['variance']:.2f}",
                f"{whole['effective_batch']:.2f}",
            ]
        )
    header = ["trained", "proportion", "tokens", "correction", "cosine, one draw", "cosine, mean", "bias"]
    return [*header, "variance", "effective batch"], rows


def rates(report: dict[str, Any]) -> Table:
    """All weights, 30 %: losses at the learning rate that suits full training, and at parts of it."""
    arms = {MAIN_ARM: "full training's best rate", "half the rate": "half of it", "quarter of the rate": "a quarter"}
    shown = [row for row in report["comparison"] if row["trained"] == "full" and row["proportion"] in (None, SHARE)]
    found = {(row["arm"], row["method"]): row for row in shown}
    arms = {arm: label for arm, label in arms.items() if any(key[0] == arm for key in found)}
    methods = dict.fromkeys(method for arm, method in found if arm == "half the rate")
    rows = [
        [
            BASELINES.get(method, f"**{method}**"),
            *(loss_of(found[arm, method]) if (arm, method) in found else "" for arm in arms),
        ]
        for method in methods
    ]
    return ["tokens", *arms.values()], rows


def encoders(report: dict[str, Any]) -> Table:
    """Scores by task and strategy, in points of 100."""
    methods = ("full", "random", "supervised", "stratified", "contiguous")
    rows = [
        [label, *(score_of(report, task, method) for method in methods)]
        for task, label in ENCODER_TASKS.items()
        if any(run["task"] == task for run in report["runs"])
    ]
    return ["", "all tokens", "random", "labelled first", "stratified", "contiguous"], rows


def regularisation(report: dict[str, Any]) -> Table:
    """Paraphrase pairs with 32 random tokens, by regularisation."""
    task = "paraphrase, 32"
    found = [run["method"] for run in report["runs"] if run["task"] == task]
    names = {"full": "all tokens", "random": "32 at random, weight decay 0.01"}
    return ["", "accuracy"], [
        [names.get(method, method.replace("random", "32 at random")), score_of(report, task, method)]
        for method in sorted(found, key=lambda method: list(names).index(method) if method in names else 2)
    ]


# ------------------------------------------------------------------------------------------------------------- cells


def loss_of(row: dict[str, Any]) -> str:
    """Mean, standard deviation over the seeds, their number."""
    spread = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.3f}"
    return f"{row['validation_loss']:.3f}{spread} ({row['seeds']})"


def gap(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']:+.4f} ± {found['standard_error']:.4f}"


def against_random(row: dict[str, Any]) -> list[str]:
    found = None if row["method"] == "random" else row["to_random"]
    return [gap(found), verdict(found)]


def verdict(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] == found["standard_error"] == 0:
        return ""
    return "better" if found["better"] else "worse" if found["worse"] else "no"


def costs(row: dict[str, Any]) -> list[str]:
    """Bytes kept, work and time of a step; the last two over full training's."""
    low_to_high = row["time_ratio_to_full"]
    saved = f"{row['saved_for_backward_bytes'] / BYTES_IN_MIB:.0f} MiB"
    return [saved, f"{row['units_ratio_to_full']:.2f}", "" if low_to_high is None else f"{low_to_high[1]:.2f}"]


def score_of(report: dict[str, Any], task: str, method: str) -> str:
    """Mean and deviation; where it is beyond two standard errors from random tokens, a mark."""
    run = next((run for run in report["runs"] if (run["task"], run["method"]) == (task, method)), None)
    if run is None:
        return ""
    text = f"{100 * run['mean']:.1f} ± {100 * run['standard_deviation']:.1f}"
    row = next(row for row in report["comparison"] if (row["task"], row["method"]) == (task, method))
    against = row["to_random"] if method != "random" else None
    marks = {"better": " (better)", "worse": " (worse)"}
    return text + marks.get(verdict(against), "")
