"""Command: how good the selective gradient is, for a model and its data, before anything is trained.

    python ./tokentune/diagnose.py --model_name_or_path ./models/my-model --dataset_name_or_path data.jsonl \
        --proportions 0.1 0.3 0.5 --selections random --corrections 0 1

Takes the gradient of a few rows over all tokens, then many draws of the selective one over the same rows, for every
proportion, strategy and correction that is asked for, and compares them: cosine and error of one draw and of the mean
over draws, bias, variance, the effective batch size, bytes; by layer and by kind of module. Warns where the method is
known to fail, writes `diagnosis.json` (schema in `gradients/report.py`), and ends in one recommendation. A table with
`--full`, pictures with `--figure`. The flags are those of `finetune.py` that a gradient depends on, and those of
`settings/diagnose.py`. Adapters are as training would begin with them, where half of their factors are zero.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("diagnose")  # before the imports below, which take seconds

import json

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from tokentune.cli.arguments import flags_given, parse_arguments
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.cli.preview import Inputs, read_inputs
from tokentune.core.layers import inner_model
from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.inspection.checks import look_at
from tokentune.data.instruction_data import load_instruction_data
from tokentune.errors import UserError
from tokentune.gradients.draw_statistics import DrawStatistics, RowVariance
from tokentune.gradients.figures import draw_figures
from tokentune.gradients.measuring import (
    Batch,
    Taken,
    check_counts_items,
    micro_batches,
    supervised_items,
    take_gradient,
    without_dropout,
)
from tokentune.gradients.parts import parts_of
from tokentune.gradients.progress import Progress
from tokentune.gradients.report import build_report, print_table, say_warnings
from tokentune.models.builder import (
    base_dtype,
    check_reference,
    check_structure,
    load_reference,
    make_selective,
    needs_reference,
    prepare_model,
    unsupported_models_refused,
)
from tokentune.settings.diagnose import DiagnoseArguments, Setting
from tokentune.training.build import training_collator
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.diagnosing import for_all_tokens

logger = logging.getLogger("tokentune")

PLAIN = Setting("random", 0.0, 0.3)  # how the model is patched while it is made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    arguments = parse_arguments(argv, DiagnoseArguments)
    say_what_has_no_effect(argv)
    inputs = read_inputs(arguments)
    config, tokenizer = inputs.config, inputs.tokenizer
    dtype = base_dtype(arguments, config)
    plain = arguments.with_setting(PLAIN)
    check_structure(plain, config)
    for setting in arguments.compared:
        check_reference(arguments.with_setting(setting), config)
    numbers, rows = choose_rows(arguments, inputs)

    set_seed(arguments.optimization.seed)
    model = on_device(prepare_model(plain, dtype))
    check_counts_items(model)
    patch = patcher(arguments, model, dtype)
    with unsupported_models_refused(), without_dropout(model):
        full, results, data = compare(arguments, model, patch, tokenizer, rows)
    data |= {"rows": len(rows), "row_numbers": numbers, "micro_batch_size": arguments.diagnosis.micro_batch_size}
    facts = facts_of(model) | {"base_dtype": str(dtype).removeprefix("torch.")}
    report = build_report(arguments, model=facts, data=data, full=full, results=results)

    output = Path(arguments.diagnosis.output).expanduser()
    write_whole(output, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if arguments.diagnosis.full:
        print_table(report)
    say_warnings(report["warnings"])
    logger.info("written: %s%s", output, "" if arguments.diagnosis.full else " (--full prints it as a table, too)")
    if arguments.diagnosis.figure is not None:
        for path in draw_figures(report, Path(arguments.diagnosis.figure).expanduser()):
            logger.info("written: %s", path)
    print(f"recommendation: {report['recommendation']['message']}")


def say_what_has_no_effect(words: Sequence[str] | None) -> None:
    """Of a --config file, such as a run's run.yaml, which holds every flag of finetune.py."""
    flags = {flag.name for group in fields(DiagnoseArguments) for flag in fields(group.type) if flag.init}
    idle = sorted(flags_given(words, DiagnoseArguments).keys() - flags)
    if idle:
        logger.info("--config: without effect here: %s", ", ".join(idle))


def choose_rows(arguments: DiagnoseArguments, inputs: Inputs) -> tuple[list[int], SeededRows]:
    """The rows that are compared, and their numbers in the training data, ascending.

    Raises:
        UserError: there are too few, or some that no model can learn from.
    """
    data = load_instruction_data(arguments, inputs.tokenizer, inputs.template)
    wanted, there, seed = arguments.diagnosis.rows, len(data.train), arguments.optimization.seed
    if there < wanted:
        raise UserError(f"--rows {wanted}: the training data has {there} rows that can be learnt from; ask for fewer")
    numbers = sorted(np.random.default_rng(seed).choice(there, wanted, replace=False).tolist())
    data.train = data.train.select(numbers)
    if refusals := look_at(data, inputs.tokenizer, arguments, inputs.vocab_size).refusals:
        raise UserError(refusals[0])
    return numbers, SeededRows(data.train, seed)


def on_device(model: nn.Module) -> nn.Module:
    """The model on the accelerator, if there is one; a quantised one stands there already."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or getattr(model, "hf_device_map", None) is not None:
        return model
    return model.to(device)


def patcher(arguments: DiagnoseArguments, model: nn.Module, dtype: torch.dtype) -> Callable[[Setting], None]:
    """What makes the model select in a given way; with its reference model, read once, where that takes one.

    Raises:
        UserError: one of the ways that are compared cannot be served, before anything is measured.
    """
    reference = None

    def patch(setting: Setting, *, verify: bool = False) -> None:
        nonlocal reference
        changed = arguments.with_setting(setting)
        changed.selection.skip_verification |= not verify
        if needs_reference(changed) and reference is None:
            reference = load_reference(changed, dtype)
        make_selective(model, changed, reference)

    for setting in arguments.compared:
        patch(setting, verify=True)
    return patch


def facts_of(model: nn.Module) -> dict[str, Any]:
    """The report's `model`."""
    core = inner_model(model)
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()
    else:
        trained, total = sum(p.numel() for p in model.parameters() if p.requires_grad), core.num_parameters()
    return {"class": type(core).__name__, "parameters": total, "trainable_parameters": trained}


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(
    arguments: DiagnoseArguments,
    model: nn.Module,
    patch: Callable[[Setting], None],
    tokenizer: PreTrainedTokenizerBase,
    rows: SeededRows,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, int]]:
    """Takes all gradients. Returns the report's `full`, `results` and the counts in its `data`."""
    asked, collator = arguments.diagnosis, CausalCollator(pad_token_id=tokenizer.pad_token_id)
    batches = [for_all_tokens(batch) for batch in micro_batches(rows, collator, asked.micro_batch_size)]
    settings = arguments.compared
    with Progress(1 + len(batches) * (1 + asked.draws * len(settings)) + asked.rows) as progress:
        options = {"items": supervised_items(batches), "bf16": arguments.model.bf16, "after_batch": progress.tick}
        take_gradient(model, batches[:1], **options)  # what a first pass does once is not to count as its time
        full = take_gradient(model, batches, **options)
        between_rows = RowVariance()
        for batch in micro_batches(rows, collator, 1):
            between_rows.add(take_gradient(model, [for_all_tokens(batch)], **options).gradient)
        square = sum(float(tensor.double().square().sum()) for tensor in full.gradient.values())
        variance = between_rows.result(square)
        results = []
        for setting in settings:
            progress.name(str(setting))
            patch(setting)
            collator = training_collator(arguments.with_setting(setting).selection, tokenizer, packed=False)
            draws = draws_of(arguments, model, rows, collator, progress.tick)
            results.append(result_of(setting, full, draws, (variance, asked.rows), model))
            progress.told(str(setting), asked.draws, results[-1]["whole"]["cosine"]["mean"] or 0.0)
    signal = square - variance / asked.rows  # unbiased, of the expectation over rows
    facts = {
        "loss": full.loss,
        "norm": square**0.5,
        "saved_bytes": full.saved_bytes,
        "seconds": full.seconds,
        "row_variance": variance,
        "noise_scale": variance / signal if signal > 0 else None,
    }
    return facts, results, {"tokens": full.selected, "supervised_tokens": full.supervised}


def draws_of(
    arguments: DiagnoseArguments, model: nn.Module, rows: SeededRows, collator: Any, after_batch: Callable[[], None]
) -> Iterator[Taken]:
    """One selective gradient after the other, each as an epoch of its own would draw it."""
    asked, options = arguments.diagnosis, {"bf16": arguments.model.bf16, "after_batch": after_batch}
    for draw in range(asked.draws):
        rows.set_epoch(draw)
        batches: list[Batch] = list(micro_batches(rows, collator, asked.micro_batch_size))
        yield take_gradient(model, batches, items=supervised_items(batches), **options)


def result_of(
    setting: Setting, full: Taken, draws: Iterator[Taken], between_rows: tuple[float, int], model: nn.Module
) -> dict[str, Any]:
    """One of the report's `results`. `between_rows`: their variance and number."""
    statistics, taken = DrawStatistics(full.gradient, parts_of(model)), []
    for draw in draws:
        statistics.add(draw.gradient)
        taken.append((draw.selected, draw.supervised, draw.loss, draw.seconds, draw.saved_bytes))
    selected, supervised, losses, seconds, saved = map(np.array, zip(*taken, strict=True))
    error = float(losses.std(ddof=1)) / len(losses) ** 0.5
    return {
        **setting._asdict(),
        "draws": len(taken),
        "selected_tokens": float(selected.mean()),
        "supervised_selected": float(supervised.mean()),
        "supervised_share": float(supervised.sum() / selected.sum()),
        "loss": {"mean": float(losses.mean()), "standard_error": error},
        "saved_bytes": int(saved[0]),
        "saved_ratio": float(saved[0] / full.saved_bytes),
        "seconds": float(seconds.mean()),
        **statistics.result(*between_rows),
    }


if __name__ == "__main__":
    run_command(main)
