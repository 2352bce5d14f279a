"""The files that a run leaves besides its weights: `training_summary.json` and `training_curves.png`.

What the summary holds: docs/evaluation.md, "The training summary".
"""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB
from tokentune.data.instruction_data import InstructionData
from tokentune.environment import device_facts, library_versions
from tokentune.file_names import CURVES_NAME, SUMMARY_NAME
from tokentune.phases import times
from tokentune.settings.finetune import Arguments
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.diagnosing import COSINE, RELATIVE_ERROR
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def build_summary(
    trainer: SelectiveTrainer,
    arguments: Arguments,
    data: InstructionData,
    model_facts: dict[str, Any],
) -> dict[str, Any]:
    """The content of `training_summary.json`.

    Args:
        trainer: after `train()`.
        data: the training and validation data.
        model_facts: `class`, `parameters`, `trainable_parameters`, `base_dtype`, `saved_dtype`.
    """
    of_an_epoch, epochs = data.train_report, trainer.state.epoch
    known = of_an_epoch is not None and epochs == int(epochs)
    supervised = of_an_epoch.supervised_tokens * int(epochs) if known else None
    reports = {"train": data.train_report, "validation": data.validation_report}
    tokens = {"processed": 0, "supervised": supervised} | trainer.figures.tokens
    facts = run_facts(trainer, arguments, model_facts, reports, tokens)
    return facts | {"sources": [asdict(source) for source in data.sources]}


def run_facts(
    trainer: SelectiveTrainer,
    arguments: Arguments,
    model_facts: dict[str, Any],
    reports: dict[str, Any],
    tokens: dict[str, Any],
) -> dict[str, Any]:
    """The part of the summary that all commands share. `reports`: by split; None: no such data."""
    window = window_of(trainer.state.global_step)
    entries = _log(trainer.state.log_history, window)
    smoothed = [entry["loss_smoothed"] for entry in entries if entry["loss_smoothed"] is not None]
    seconds = trainer.figures.training_seconds
    return {
        "schema_version": SCHEMA_VERSION,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_folder": trainer.args.output_dir,
        "seed": arguments.optimization.seed,
        "settings": arguments.settings(),
        "auto": trainer.auto_values,
        "model": model_facts,
        "data": {name: None if report is None else asdict(report) for name, report in reports.items()},
        "optimizer_steps": trainer.state.global_step,
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "saved_step": trainer.saved_step,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "tokens": tokens,
        "loss": {"first": smoothed[0], "last": smoothed[-1], "window": window},
        "validation_loss": _validation(trainer.figures.validation_losses, trainer.saved_step),
        "peak_memory_bytes": entries[-1]["memory_peak_bytes"],
        "saved_for_backward_bytes": trainer.figures.saved_for_backward_bytes,
        "tokens_per_second": tokens["processed"] / seconds,
        "training_seconds": seconds,
        **times(),
        "log": entries,
        "device": device_facts(),
        "versions": library_versions(),
    }


def warn_without_gain(summary: dict[str, Any]) -> None:
    """Warns if the saved weights are no better on the validation data than the model before training."""
    losses = summary["validation_loss"]
    if losses is not None and losses["base"] is not None and losses["final"] >= losses["base"]:
        logger.warning(
            "the validation loss did not fall: %.4f before training, %.4f of what is saved (step %d)",
            *(losses["base"], losses["final"], summary["saved_step"]),
        )


def _log(history: list[dict[str, float]], window: int) -> list[dict[str, Any]]:
    entries = [_log_entry(entry) for entry in history if "loss" in entry]
    for name in ("loss", "loss_all_tokens"):
        if name in entries[0]:
            for entry, mean in zip(entries, smooth(entries, name, window), strict=True):
                entry[f"{name}_smoothed"] = mean
    return entries


def _log_entry(entry: dict[str, float]) -> dict[str, float]:
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    kept = {name: entry.get(name) for name in names}
    kept |= {name: entry[name] for name in (COSINE, RELATIVE_ERROR, "loss_all_tokens") if name in entry}
    # A number of bytes over 2**30 is exact in float64, so the product is the number of bytes again.
    kinds = ("allocated", "reserved", "peak")
    return kept | {f"memory_{kind}_bytes": int(entry[f"memory_{kind}_gib"] * BYTES_IN_GIB) for kind in kinds}


def window_of(steps: int) -> int:
    """Over how many steps of a run a loss is averaged: a tenth of them; at least 10, but at most half of them."""
    return max(steps // 10, min(10, steps // 2), 1)


def smooth(entries: list[dict[str, Any]], name: str, window: int) -> list[float | None]:
    """At each log entry the mean of a figure over the last `window` steps; None where there were not so many yet.

    An entry is itself a mean, over the steps since the one before it. Whole entries are taken, so it may be more steps.
    """
    ends, sums, means, first = [0], [0.0], [], 0
    for entry in entries:
        sums.append(sums[-1] + entry[name] * (entry["step"] - ends[-1]))
        ends.append(entry["step"])
        while ends[-1] - ends[first + 1] >= window:
            first += 1
        steps = ends[-1] - ends[first]
        means.append((sums[-1] - sums[first]) / steps if steps >= window else None)
    return means


def _validation(losses: list[tuple[int, float]], saved_step: int) -> dict[str, Any] | None:
    if not losses:
        return None
    steps = [{"step": step, "loss": loss} for step, loss in losses]
    final = dict(losses).get(saved_step, losses[-1][1])
    return {"base": dict(losses).get(0), "final": final, "best": min(steps, key=lambda at: at["loss"]), "steps": steps}


def write_summary(summary: dict[str, Any], run_folder: Path, name: str = SUMMARY_NAME) -> Path:
    """Writes a summary as JSON, whole or not at all. Numbers that JSON cannot hold (NaN, infinity) become null."""
    path = run_folder / name
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    return path


def draw_curves(summary: dict[str, Any], run_folder: Path, *, loss_unit: str = "nats per token") -> Path:
    """Draws `training_curves.png` from a summary: losses, learning rate, memory and gradient norm over the steps.

    With --diagnose_steps also how far the selective gradient is from the full one.
    """
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    log, on_cpu = summary["log"], summary["device"]["type"] == "cpu"
    rows = 3 if any(COSINE in entry for entry in log) else 2
    figure, panels = pyplot.subplots(rows, 2, figsize=(11, 3.75 * rows), sharex=True)
    loss, rate, memory, norm, *compared = panels.flat

    def draw(axes: Any, name: str, style: str = "-", unit: float = 1.0, **options: Any) -> None:
        points = [(entry["step"], entry[name] / unit) for entry in log if entry.get(name) is not None]
        axes.plot(*zip(*points, strict=True), style, marker="o" if len(points) <= 30 else None, markersize=3, **options)

    mean = f", mean of {summary['loss']['window']} steps"
    for name, label, color in (
        ("loss", "training", "tab:blue"),
        ("loss_all_tokens", "training, all supervised tokens", "tab:cyan"),
    ):
        if name in log[0]:
            draw(loss, name, color=color, alpha=0.3)
            draw(loss, f"{name}_smoothed", color=color, label=label + mean)
    if summary["validation_loss"] is not None:
        points = [(point["step"], point["loss"]) for point in summary["validation_loss"]["steps"]]
        loss.plot(
            *zip(*points, strict=True), marker="s", markersize=5, color="tab:orange", label="validation (all tokens)"
        )
    draw(rate, "learning_rate", color="tab:green")
    # On the CPU reserved and allocated memory are the same number: the resident memory.
    kinds = {"peak": "-", "allocated": "--"} if on_cpu else {"peak": "-", "reserved": "--", "allocated": ":"}
    for name, style in kinds.items():
        label = "now" if on_cpu and name == "allocated" else name
        draw(memory, f"memory_{name}_bytes", style, BYTES_IN_GIB, label=label)
    draw(norm, "grad_norm", color="tab:purple")
    for axes, name in zip(compared, (COSINE, RELATIVE_ERROR), strict=False):
        draw(axes, name, color="tab:red")
        axes.axhline(0.0, color="0.6", linewidth=0.8)

    titles = (
        ("Loss", loss_unit),
        ("Learning rate", "learning rate"),
        ("Resident memory of the process" if on_cpu else "GPU memory", "GiB"),
        ("Gradient norm, before clipping", "L2 norm"),
        ("Selective to full gradient", "cosine"),
        ("Their difference", "/ full norm"),
    )
    for axes, (title, unit) in zip(panels.flat, titles, strict=False):
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-1]:
        axes.set_xlabel("optimizer step")
    memory.set_ylim(0, 1.15 * max(line.get_ydata().max() for line in memory.get_lines()))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss.legend()
    memory.legend()
    figure.suptitle(Path(summary["run_folder"]).name, fontsize=12)
    figure.tight_layout()
    path = run_folder / CURVES_NAME
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
