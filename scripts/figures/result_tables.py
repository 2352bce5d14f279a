"""The tables of README and docs that are made from committed results, by name; one function each, here or beside it.

Not a command: `scripts/docs.py` puts them in.
"""

import statistics
from collections.abc import Callable

import estimate_tables
import prompt_tables
import quality_tables
import step_tables
from quality_tables import BYTES_IN_MIB
from tables import WEIGHTS, markdown, read

TASK_NAMES = {
    "sst2": "SST-2, accuracy",
    "cola": "CoLA, Matthews correlation",
    "rte": "RTE, accuracy",
    "paraphrase": "paraphrase pairs, accuracy",
    "wnut17": "WNUT-17, entity F1",
    "digits": "digits, accuracy",
}


def instruction_tuning_table() -> str:
    report = read("instruction_tuning.json")
    rows = [["base", f"{report['rows'][0]['base_loss']:.3f}", "", ""]]
    for row in report["rows"]:
        saved = f"{row['saved_for_backward_bytes'] / BYTES_IN_MIB:.0f} MiB"
        rows.append([row["run"], f"{row['final_loss']:.3f}", saved, f"{row['tokens_per_second']:.0f}"])
    merge = report["merge"]
    gap = abs(merge["merged, float32"] - merge["base + adapter, float32"])
    rows.append([f"... merged ({gap:.0e} from base + adapter)", f"{merge['merged, float32']:.3f}", "", ""])
    return markdown(["", "validation loss", "kept for backward", "tokens/s (CPU)"], rows)


def merging_table() -> str:
    """A QLoRA adapter merged into either base: how far from what was trained, and the validation loss."""
    report = read("merging.json")
    rows = [["base, not trained", "", f"{report['base']['validation_loss']:.4f}"]]
    rows.append(["4-bit base + adapter, as trained", "", f"{report['trained']['validation_loss']:.4f}"])
    for merged in report["merged"]:
        kind = {"16bit": "16-bit", "dequantized": "dequantised"}[merged["base"]]
        gap = merged["from_training"]
        difference = f"{100 * gap['relative_rms']:.2g} (largest {100 * gap['relative']:.2g})"
        name = f"merged into the {kind} base, {merged['dtype']}"
        rows.append([name, difference, f"{merged['validation_loss']:.4f}"])
    header = ["model", "logits' difference from what was trained, % of their deviation", "validation loss"]
    return markdown(header, rows)


def quickstart_table() -> str:
    """From a copy of the quick start's own report.json."""
    match = read("quickstart.json")["exact_match"]
    names = {"base": "base", "lora": "LoRA", "merged": "LoRA + TokenTune"}
    models = [model for model in names if model in match]
    rows = [[skill, *(f"{match[model][skill]:.0%}" for model in models)] for skill in match["base"]]
    return markdown(["exact match", *(names[model] for model in models)], rows)


def families_table() -> str:
    """The families that are served, and below them those that are refused, with the reason."""
    served, refused = [], []
    for row in read("families.json")["rows"]:
        name = row["family"] + (" *" if row["drawn"] else "")
        if "refused" in row:
            refused.append([name, f"`{row['class']}`", row["refused"]])
        else:
            again = f"{row['checkpointed_bytes_ratio']:.2f}" if row.get("checkpointing_is_exact") else "-"
            figures = [row["attention"], f"{row['difference']:.0e}", f"{row['bytes_ratio']:.2f}", again]
            served.append([name, f"`{row['class']}`", *figures])
    kept = "kept for backward, of plain"
    header = ["served", "class", "attention", "largest difference", kept, "with checkpointing"]
    return f"{markdown(header, served)}\n\n{markdown(['refused', 'class', 'reason'], refused)}"


def classification_table() -> str:
    """Scores by task and method, below them what a step costs; then the tasks whose methods are others."""
    report = read("classification.json")
    counts = ["full", "32", "16", "8", "4"]
    texts = ["sst2", "cola", "rte", "paraphrase"]
    counts = [method for method in counts if any(run["method"] == method for run in report["runs"])]
    rows = [[TASK_NAMES[task], *(score_of(report, task, method) for method in counts)] for task in texts]
    header = ["", *("all tokens" if method == "full" else f"{method} selected" for method in counts)]
    costs = {row["method"]: row for row in report["steps"]["rows"]}
    shape = f"{report['steps']['batch']} x {report['steps']['length']} tokens"
    saved, step = [f"kept for backward, {shape}"], [f"step, {shape}"]
    for method in counts:
        row = costs.get(method)
        size = "" if row is None else f"{row['saved_for_backward_bytes'] / BYTES_IN_MIB:.0f} MiB"
        time = "" if row is None else f"{statistics.median(row['seconds']):.2f} s"
        if row is not None and method != "full":
            size, time = f"{size} ({row['bytes_ratio_to_full']:.2f})", f"{time} ({row['time_ratio_to_full']:.2f})"
        saved.append(size)
        step.append(time)
    others = [
        [TASK_NAMES[task], *(score_of(report, task, method) for method in ("full", *methods))]
        for task, methods in {"wnut17": ("random 0.3", "labelled 0.3"), "digits": ("0.5", "")}.items()
    ]
    others_header = ["", "all tokens", "30 % (digits: 50 %) at random", "30 %, entities first"]
    return f"{markdown(header, [*rows, saved, step])}\n\n{markdown(others_header, others)}"


def score_of(report: dict, task: str, method: str) -> str:
    """Mean and standard deviation, in points of 100; empty for what was not run."""
    for run in report["runs"]:
        if (run["task"], run["method"]) == (task, method):
            return f"{100 * run['mean']:.1f} ± {100 * run['standard_deviation']:.1f}"
    return ""


def padding_table() -> str:
    """Work of padded batches over that of their rows, answers selected."""
    report = read("padding.json")
    orders = {"random": "random order", "by_length": "by length", "by_both": "`--group_by_length`"}
    rows = [
        [WEIGHTS[row["train"]], str(row["micro_batch"]), *(f"+{row[order] - 1:.1%}" for order in orders)]
        for row in report["rows"]
        if row["selected"] == "answers"
    ]
    data, batch, epochs = report["data"], report["global_batch"], report["epochs"]
    tokens, share = f"{data['tokens']:,} tokens", f"{data['targets'] / data['tokens']:.0%} of them answers"
    said = f"{data['rows']:,} tool calls ({tokens}, {share}), a global batch of {batch}, mean of {epochs} orders."
    return f"{markdown(['trained', 'micro-batch', *orders.values()], rows)}\n\n{said}"


TABLES: dict[str, Callable[[], str]] = {
    "step": step_tables.step_table,
    "step_lora": lambda: step_tables.short_table("table", "30 %", trains=("lora",), key_value_heads=4, dtype="float32"),
    "lowest": step_tables.lowest_table,
    "answers": step_tables.answers_table,
    "answers_short": lambda: step_tables.short_table("answers", "the answers", layers=6),
    "growth": step_tables.growth_table,
    "qlora": step_tables.qlora_table,
    "bounds": step_tables.bounds_table,
    "estimate": estimate_tables.estimate_table,
    "estimate_baselines": estimate_tables.estimate_baselines_table,
    "sharded": estimate_tables.sharded_table,
    "instruction_tuning": instruction_tuning_table,
    "merging": merging_table,
    "padding": padding_table,
    "quickstart": quickstart_table,
    "families": families_table,
    "classification": classification_table,
    "quality_strategies": lambda: markdown(*quality_tables.strategies(read("selection_quality.json"))),
    "quality_equal_cost": lambda: markdown(*quality_tables.equal_cost(read("selection_quality.json"))),
    "quality_proportions": lambda: markdown(*quality_tables.proportions(read("selection_quality.json"))),
    "quality_corrections": lambda: markdown(*quality_tables.corrections(read("selection_quality.json"))),
    "gradient_quality": lambda: markdown(*quality_tables.gradients(read("gradient_quality.json"))),
    "quality_rates": lambda: markdown(*quality_tables.rates(read("selection_quality.json"))),
    "quality_encoders": lambda: markdown(*quality_tables.encoders(read("selection_quality_encoders.json"))),
    "prompt_heavy": lambda: markdown(*prompt_tables.time_to_loss(read("prompt_heavy.json"))),
    "whole_runs": lambda: markdown(*prompt_tables.whole_runs(read("whole_runs.json"))),
    "quality_regularisation": lambda: markdown(*quality_tables.regularisation(read("selection_quality_encoders.json"))),
}
