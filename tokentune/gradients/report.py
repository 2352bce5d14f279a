"""What `diagnose.py` reports: `diagnosis.json`, a table, warnings, and a recommendation.

The JSON's schema, version 1. Norms are in nats per token per unit of weight; a *ratio* is a norm over the full
gradient's, 1 its size; null: not defined (the full gradient is zero there).

    schema_version           1
    finished                 UTC time, ISO 8601
    settings                 {flag: value}, every flag of diagnose.py
    model                    {class, parameters, trainable_parameters, base_dtype}
    data                     {rows (compared), row_numbers (in the training data, from 0), tokens (real ones),
                             supervised_tokens (targets), micro_batch_size (sequences)}
    full                     the gradient of all tokens: {loss (nats per token), norm, saved_bytes (by autograd, in the
                             first micro-batch), seconds, row_variance (T of `gradients/draw_statistics.py`, norm
                             squared), noise_scale (rows: T over an unbiased estimate of |g|^2; null: not positive)}
    results                  [one for each strategy, correction and proportion]:
        strategy, correction, proportion   as they were asked for: a number, or "answers", "answers+0.1"
        draws                int
        selected_tokens, supervised_selected   mean of the draws: tokens with gradients, those of them with a loss
        supervised_share     of the selected tokens
        loss                 {mean, standard_error} of what was differentiated, nats per token
        saved_bytes          of the first draw's first micro-batch
        saved_ratio          saved_bytes / full.saved_bytes
        seconds              of a draw's forward and backward passes, mean (noisy: other work on the machine counts)
        whole                figures of all weights, as below, and effective_batch: rows of full training that are as
                             noisy as one row of this (a share; formula in `gradients/draw_statistics.py`)
        by_layer             [{layer (from 0), figures}]
        by_kind              [{kind (of module; "adapter of ..." with LoRA), figures}]
    recommendation           {strategy, correction, proportion, time_ratio (seconds of a step over full.seconds),
                             saved_ratio, effective_batch, pays_in_time (whether it gets more out of the time than full
                             training), message}; null but for the message where nothing can be recommended
    warnings                 [{sign, strategy, correction, proportion, message}]
    device                   {type, name, count}: GPU, or the CPU with its threads
    versions                 {tokentune, python, and each library}

Figures, of the weights of a part:

    full_norm                norm of the full gradient
    cosine                   {mean, standard_error} over draws: of one draw to the full gradient, -1 to 1
    relative_error           {mean, standard_error} over draws: norm of their difference, a ratio
    variance                 of one draw, summed over the weights, over |g|^2
    mean_of_draws            cosine, relative_norm and bias_raw (ratios: norms of mean, and of mean - full) as the mean
                             came out of these draws; cosine_corrected (an estimate: may pass 1),
                             relative_norm_corrected and bias, freed from what few draws leave of the variance;
                             bias_squared, the square before it is cut off at 0
"""

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from tokentune.environment import device_facts, library_versions
from tokentune.gradients.recommendation import recommend
from tokentune.sampling.independent import why_not_independent
from tokentune.sampling.schedule import parse_prefix_length
from tokentune.settings.diagnose import DiagnoseArguments, Setting, named

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Below these a result is warned of; `LEAST_SAVING`: of what a proportion could save at most.
LEAST_PROPORTION, LEAST_SUPERVISED, LEAST_SAVING, LEAST_COSINE = 0.1, 0.5, 0.5, 0.8
ALL_TARGETS = 0.95  # of the targets are as good as all
LEAST_CORRECTED = 0.2  # proportion: below, a corrected gradient's variance is many times the other's


def build_report(arguments: DiagnoseArguments, **measured: Any) -> dict[str, Any]:
    """The report, as the schema above has it. `measured`: its `model`, `data`, `full` and `results`."""
    data = measured["data"]
    warnings = [warning for result in measured["results"] for warning in failure_signs(result, data)]
    return {
        "schema_version": SCHEMA_VERSION,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": arguments.settings(),
        **measured,
        "recommendation": recommend(measured["full"], measured["results"], warnings),
        "warnings": warnings,
        "device": device_facts(),
        "versions": library_versions(),
    }


# --- failure signs ----------------------------------------------------------------------------------------------------


def share_of(result: dict[str, Any], data: dict[str, Any]) -> float:
    """The proportion of a result as a number: where it has none, the share of all tokens that was selected."""
    proportion = result["proportion"]
    return result["selected_tokens"] / data["tokens"] if isinstance(proportion, str) else proportion


def failure_signs(result: dict[str, Any], data: dict[str, Any]) -> list[dict[str, Any]]:
    """Warnings of the signs that a selection is a poor one, the paper's among them, each with what helps.

    Args:
        data: the report's.
    """
    proportion, share, ratio = share_of(result, data), result["supervised_share"], result["saved_ratio"]
    answers = isinstance(result["proportion"], str)  # no token with a loss is left out, however few are selected
    cosine = result["whole"]["mean_of_draws"]["cosine_corrected"]
    signs = {}
    if proportion < LEAST_PROPORTION and not answers:
        signs["proportion"] = (
            f"below {LEAST_PROPORTION:.0%} of the tokens the results of the paper's models fall off: select more"
        )
    if share < LEAST_SUPERVISED:
        cure = "compare --selections supervised"
        if result["supervised_selected"] >= ALL_TARGETS * data["supervised_tokens"]:
            cure = "all that have one are selected, and a smaller proportion would do"
        signs["no_loss"] = (
            f"{1 - share:.0%} of the selected tokens carry no loss, and learn through others' attention alone: {cure}"
        )
    if 1 - ratio < LEAST_SAVING * (1 - proportion):
        signs["memory"] = (
            f"a step keeps {ratio:.0%} of full training's bytes, less than half of what {proportion:.3g} of the tokens "
            "could save: the rest's keys and values, or what does not depend on tokens, outweigh it. Compare "
            "estimate.py, or add --gradient_checkpointing"
        )
    if cosine is not None and cosine < LEAST_COSINE:
        size = parse_prefix_length(str(result["proportion"]))
        corrects = result["correction"] < 1 and proportion >= LEAST_CORRECTED
        corrects = corrects and why_not_independent(result["strategy"], size) is None
        cure = "--corrections 1, or a larger proportion" if corrects else "a larger proportion"
        signs["direction"] = (
            f"the mean over draws has another direction than the full gradient (cosine {cosine:.2f}), which no larger "
            f"batch mends: try {cure}"
        )
    setting = {name: result[name] for name in Setting._fields}
    return [{"sign": sign} | setting | {"message": message} for sign, message in signs.items()]


def say_warnings(warnings: Sequence[dict[str, Any]]) -> None:
    """One line for each sign, with the first of its messages and how many settings it holds for."""
    for sign, count in Counter(warning["sign"] for warning in warnings).items():
        first = next(warning for warning in warnings if warning["sign"] == sign)
        setting = Setting(*(first[name] for name in Setting._fields))
        more = f" (and {count - 1} more, in the JSON)" if count > 1 else ""
        logger.warning("%s: %s%s", setting, first["message"], more)


# --- table ------------------------------------------------------------------------------------------------------------


COLUMNS = ("one draw: cosine", "error", "mean: cosine", "norm", "bias", "variance", "effective batch", "bytes", "loss")


def print_table(report: dict[str, Any]) -> None:
    """The results on stdout, one line for each setting, and what the columns mean."""
    data, noise = report["data"], report["full"]["noise_scale"]
    table = Table(
        title=f"{report['settings']['model_name_or_path']}: {data['rows']} rows, {data['tokens']:,} tokens, "
        f"{data['supervised_tokens']:,} of them with a loss; {report['results'][0]['draws']} draws",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("strategy")
    for name in ("correction", "proportion", *COLUMNS):
        table.add_column(name, justify="right")
    previous = None
    for result in report["results"]:
        kind = result["strategy"], f"{result['correction']:g}"
        if previous not in (None, kind):
            table.add_section()
        table.add_row(*(kind if kind != previous else ("", "")), named(result["proportion"]), *cells(result))
        previous = kind
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a line of a log is not broken
    console.print(table)
    said = "cannot be told from so few rows" if noise is None else f"{noise:,.1f} rows"
    console.print(
        "Against the full gradient, in its size: one draw (± standard error); the mean of all draws and its bias, "
        "freed from the variance that it still holds. Effective batch: rows of full training as noisy as one row.\n"
        "Bytes: kept for the backward pass, of full training's. Loss: the share of selected tokens that have one. "
        f"Noise scale of full training: {said}.",
        soft_wrap=True,
    )


def cells(result: dict[str, Any]) -> list[str]:
    """A result's figures, as the table shows them under `COLUMNS`."""
    whole, mean = result["whole"], result["whole"]["mean_of_draws"]
    with_errors = [
        "-" if figure["mean"] is None else f"{figure['mean']:.3f} ± {figure['standard_error']:.3f}"
        for figure in (whole["cosine"], whole["relative_error"])
    ]
    of_mean = mean["cosine_corrected"], mean["relative_norm_corrected"], mean["bias"]
    numbers = [
        "-" if number is None else f"{number:.3f}" for number in (*of_mean, whole["variance"], whole["effective_batch"])
    ]
    return [*with_errors, *numbers, f"{result['saved_ratio']:.0%}", f"{result['supervised_share']:.0%}"]
