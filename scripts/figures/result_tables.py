"""The tables of README and docs that are made from committed results, one function each.

Not a command: `scripts/docs.py` puts them in.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import prompt_tables
import quality_tables
from quality_tables import BYTES_IN_MIB

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
BYTES_IN_GIB = 2**30
STEP_ANSWERS = "step_answers_cpu.json"  # of the suite `answers`
METHOD_NAMES = {
    "full": "plain training",
    "full_chunked": "plain, loss in chunks",
    "checkpointing": "plain, gradient checkpointing",
    "checkpointing_chunked": "plain, gradient checkpointing, loss in chunks",
    "sequence_chunks": "plain, sequence in chunks of 512 tokens",
    "tokentune": "**TokenTune, 30 % of the tokens**",
    "tokentune_checkpointing": "**TokenTune, 30 %, checkpointing**",
    "tokentune_segments": "**TokenTune, 30 %, lowest memory**",
    "tokentune_offload": "**TokenTune, 30 %, checkpointing, offloaded**",
}
# What estimate.py calls its rows with a chunked loss.
ESTIMATED_IN_CHUNKS = {
    "plain, chunked loss": "full_chunked",
    "gradient checkpointing + chunked loss": "checkpointing_chunked",
}
WEIGHTS = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}

TASK_NAMES = {
    "sst2": "SST-2, accuracy",
    "cola": "CoLA, Matthews correlation",
    "rte": "RTE, accuracy",
    "paraphrase": "paraphrase pairs, accuracy",
    "wnut17": "WNUT-17, entity F1",
    "digits": "digits, accuracy",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def step_rows(suite: str, *, file: str = "step_cpu.json", **chosen: object) -> list[dict]:
    """Rows of a suite of scripts/bench/step.py with these settings, without those that ran out of memory."""
    rows = [row for row in read(file)["rows"] if row["suite"] == suite and "error" not in row]
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def times(row: dict, base: str) -> str:
    """0.45 (0.44 to 0.46): the time's ratio with its interval; 1 for the base itself."""
    if row["method"] == base:
        return "1"
    low, middle, high = row[f"time_ratio_to_{base}"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step_table(**chosen: object) -> str:
    rows = []
    for row in step_rows("table", key_value_heads=4, dtype="float32", **chosen):
        saved, ratio = f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB", f"{row['bytes_ratio_to_full']:.2f}"
        seconds = f"{statistics.median(row['seconds']):.2f} s"
        rows.append([WEIGHTS[row["train"]], METHOD_NAMES[row["method"]], saved, ratio, seconds, times(row, "full")])
    return markdown(["trained", "method", "kept for backward", "of plain", "step", "of plain (95 % interval)"], rows)


def lowest_table() -> str:
    """24 layers, against gradient checkpointing."""
    header = ["trained", "key-value heads", "method", *columns_against("checkpointing")]
    rows = []
    for row in step_rows("lowest"):
        if row["seconds"]:
            own = [WEIGHTS[row["train"]], heads_of(row), METHOD_NAMES[row["method"]]]
            rows.append([*own, *figures_against("checkpointing", row)])
    return markdown(header, rows)


def answers_table() -> str:
    """Long prompts: all tokens of the answers selected, 5 % of a row."""
    base = "checkpointing_chunked"
    header = ["layers", "trained", "key-value heads", "method", *columns_against(base)]
    rows = []
    for row in step_rows("answers", file=STEP_ANSWERS):
        name = METHOD_NAMES[row["method"]].replace("30 % of the tokens", "the answers").replace("30 %", "the answers")
        rows.append([str(row["layers"]), WEIGHTS[row["train"]], heads_of(row), name, *figures_against(base, row)])
    return markdown(header, rows)


def answers_short_table() -> str:
    """The same at 6 layers: TokenTune below ordinary training with the loss in chunks, and both with checkpointing."""
    pairs = {
        "full_chunked": ("tokentune", ""),
        "checkpointing_chunked": ("tokentune_checkpointing", ", checkpointing"),
    }
    rows = []
    for train in ("full", "lora"):
        found = {row["method"]: row for row in step_rows("answers", file=STEP_ANSWERS, layers=6, train=train)}
        for base, (method, addition) in pairs.items():
            for row, name in ((found[base], "plain, loss in chunks"), (found[method], "**TokenTune, the answers**")):
                ratios = ["", ""] if row is found[base] else [f"{row[f'bytes_ratio_to_{base}']:.2f}", times(row, base)]
                saved, seconds = (
                    f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB",
                    f"{statistics.median(row['seconds']):.2f} s",
                )
                rows.append([WEIGHTS[train], name + addition, saved, ratios[0], seconds, ratios[1]])
    above = "of the row above"
    return markdown(["trained", "method", "kept for backward", above, "step", f"{above} (95 % interval)"], rows)


def columns_against(base: str) -> list[str]:
    name = {"checkpointing": "checkpointing", "checkpointing_chunked": "checkpointing, loss in chunks"}[base]
    return ["kept for backward", f"of {name}", "step", "time, of the same (95 % interval)"]


def figures_against(base: str, row: dict) -> list[str]:
    """A measured step beside another method's."""
    saved, ratio = f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB", f"{row[f'bytes_ratio_to_{base}']:.2f}"
    return [saved, ratio, f"{statistics.median(row['seconds']):.2f} s", times(row, base)]


def heads_of(row: dict) -> str:
    return f"{row['key_value_heads']} of {row['heads']}"


def growth_table() -> str:
    """Exponents of growth with the sequence and with layers, per method."""
    names = {"saved_bytes": "kept", "step_peak_bytes": "peak", "seconds": "time"}
    suites = {"length": "sequence", "depth": "layers"}
    found = [fit for fit in read("step_cpu.json")["growth"] if fit["suite"] in suites]
    fits = {(fit["method"], fit["suite"], fit["quantity"]): fit["exponent"] for fit in found}
    columns = [(suite, quantity) for suite in suites for quantity in names]
    methods = dict.fromkeys(method for method, *_ in fits)
    rows = [[METHOD_NAMES[m], *(f"{fits[m, *column]:.2f}" for column in columns)] for m in methods]
    return markdown(["grows with", *(f"{suites[suite]}: {names[quantity]}" for suite, quantity in columns)], rows)


def qlora_table() -> str:
    """Where a QLoRA step's time goes."""
    rows = []
    for row in step_rows("qlora"):
        split = row["dequantisation"]
        share = split["dequantisation_seconds"] / split["step_seconds"]
        seconds = f"{statistics.median(row['seconds']):.2f} s"
        rows.append([row["dtype"], METHOD_NAMES[row["method"]], seconds, times(row, "full"), f"{share:.0%}"])
    return markdown(["computed in", "method", "step", "of plain (95 % interval)", "dequantisation"], rows)


def bounds_table() -> str:
    """What the method is held to, beside what was measured."""
    rows = []
    for entry in read("step_cpu.json")["bounds"]:
        about = f"{WEIGHTS[entry['train']]}, {entry['key_value_heads']} key-value heads, {entry['dtype']}"
        measured = f"{entry['measured']:.3f}"
        if "interval" in entry:
            measured += " ({:.3f} to {:.3f})".format(*entry["interval"])
        rows.append([entry["what"], about, f"{entry['bound']:.2f}", measured, "yes" if entry["holds"] else "**no**"])
    return markdown(["ratio", "of", "at most", "measured", "holds"], rows)


def estimate_table() -> str:
    """Estimated peaks, and the smallest card that holds them, of two models side by side."""
    names = {"llama_2_7b": "Llama-2-7B", "llama_3_8b": "Llama-3-8B"}
    reports = [read(f"estimate_{name}.json") for name in names]
    models = [{(row["weights"], row["method"]): row for row in report["rows"]} for report in reports]
    rows = []
    for weights, method in models[0]:
        name = METHOD_NAMES.get(ESTIMATED_IN_CHUNKS.get(method), method)
        row = [weights, f"**{name}**" if name.startswith("TokenTune") else name]
        for model in models:
            found = model[weights, method]
            card = f"{found['fits_gb'][0]} GB" if found["fits_gb"] else "none"
            kept, peak = (f"{found['bytes'][key] / BYTES_IN_GIB:.1f} GiB" for key in ("activations", "peak"))
            row += [kept, peak, card]
        rows.append(row)
    columns = [f"{name}: {what}" for name in names.values() for what in ("kept for backward", "peak", "smallest card")]
    return markdown(["trained", "method", *columns], rows)


def estimate_baselines_table() -> str:
    """Peaks with checkpointing: the logits of all tokens at once; the loss in chunks; 30 % of the tokens selected."""
    files = {2048: "estimate_llama_3_8b.json", 8192: "estimate_llama_3_8b_8192.json"}
    methods = {
        "gradient checkpointing": "all logits at once",
        "gradient checkpointing + chunked loss": "all tokens, the loss in chunks",
        "TokenTune + checkpointing": "**TokenTune, 30 %**",
    }
    rows = [
        [weights, f"{length:,}", *(peak_of(file, weights, method) for method in methods)]
        for weights in ("LoRA", "QLoRA")
        for length, file in files.items()
    ]
    return markdown(["trained", "tokens", *methods.values()], rows)


def peak_of(file: str, weights: str, method: str) -> str:
    row = next(row for row in read(file)["rows"] if (row["weights"], row["method"]) == (weights, method))
    return f"{row['bytes']['peak'] / BYTES_IN_GIB:.1f} GiB"


def sharded_table() -> str:
    """Estimated peaks and traffic of large models on one GPU and on several."""
    report = read("estimate_sharded.json")["rows"]
    counts = sorted({row["processes"] for row in report})
    names = {"llama-3-8b": "8B", "llama-3-70b": "70B"}
    found = {(row["model"], row["weights"], row["method"], row["processes"]): row["bytes"] for row in report}
    rows = []
    for model, weights, method in dict.fromkeys(key[:3] for key in found):
        row = [names[model], weights, f"**{method}**" if method.startswith("TokenTune") else method]
        for count in counts:
            figures = found[model, weights, method, count]
            sent = f", {figures['sent'] / BYTES_IN_GIB:.0f} GiB sent" if count > 1 else ""
            row.append(f"{figures['peak'] / BYTES_IN_GIB:.1f} GiB{sent}")
        rows.append(row)
    shares = [f"{count} GPUs, FSDP" if count > 1 else "1 GPU" for count in counts]
    return markdown(["model", "trained", "method", *shares], rows)


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
    "step": step_table,
    "step_lora": lambda: step_table(train="lora"),
    "lowest": lowest_table,
    "answers": answers_table,
    "answers_short": answers_short_table,
    "growth": growth_table,
    "qlora": qlora_table,
    "bounds": bounds_table,
    "estimate": estimate_table,
    "estimate_baselines": estimate_baselines_table,
    "sharded": sharded_table,
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
    "quality_regularisation": lambda: markdown(*quality_tables.regularisation(read("selection_quality_encoders.json"))),
}
