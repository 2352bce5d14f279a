"""Command: what a fine-tuning run needs in memory, before any weight is loaded or any GPU rented.

    python ./tokentune/estimate.py --model_name_or_path llama-3-8b --bf16 --prefix_length 0.3

Prints a table: full fine-tuning, gradient checkpointing, both with the loss in chunks, TokenTune, and TokenTune with
checkpointing; each with all weights, LoRA and QLoRA, and the cards that each fits. The flags are those of
`finetune.py`, all but the model optional, and the model is a preset's name, a config.json, a folder or a hub id. Flags
that choose a mode (`--lora --tokentune`) mark its row; with `--only` it is the only one. `--find proportion` and
`--find batch`, with `--memory 24` (GB), give the largest that fits, `--find length` the longest sequence. Data is
read for `--prefix_length answers` alone, unless `--answer_share 0.05` says how long answers are. The real step runs,
on tensors without data (`memory/footprint.py`). `--num_processes 8 --sharding fsdp` tells what each of several GPUs
holds and sends (`memory/sharding.py`).
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("estimate")  # before the imports below, which take seconds

from tokentune.cli.arguments import flags_given, parse_arguments
from tokentune.cli.command import run_command
from tokentune.errors import UserError
from tokentune.memory.accounting import Footprint
from tokentune.memory.answer_share import with_answers
from tokentune.memory.estimate_table import Row, fits_card, in_gib, print_table, settings_of
from tokentune.memory.footprint import Estimate, estimator
from tokentune.memory.largest import largest, predicted_start
from tokentune.memory.presets import Subject, load_subject
from tokentune.memory.shallow import predicted, why_not_predictable
from tokentune.models.pretrained import check_quantization
from tokentune.models.tasks import CAUSAL_LM
from tokentune.sampling.schedule import Answers
from tokentune.settings.estimate import EstimateArguments
from tokentune.training.checkpoints.saving import write_whole

# The table's rows: the flags that choose each. Ordinary training takes its loss in chunks where it is asked to, and
# TokenTune by the flag as it is given.
METHODS = {
    "full": {"tokentune": False, "gradient_checkpointing": False, "chunked_loss": "auto"},
    "plain, chunked loss": {"tokentune": False, "gradient_checkpointing": False, "chunked_loss": "on"},
    "gradient checkpointing": {"tokentune": False, "gradient_checkpointing": True, "chunked_loss": "auto"},
    "gradient checkpointing + chunked loss": {
        "tokentune": False,
        "gradient_checkpointing": True,
        "chunked_loss": "on",
    },
    "TokenTune": {"tokentune": True, "gradient_checkpointing": False},
    "TokenTune + checkpointing": {"tokentune": True, "gradient_checkpointing": True},
}
WEIGHTS = {
    "all weights": {"lora": False, "qlora": False},
    "LoRA": {"lora": True, "qlora": False},
    "QLoRA": {"lora": True, "qlora": True},
}
TRIED = {  # what --find looks among: the flag or unit, and its ascending values
    "proportion": ("--prefix_length", tuple(step / 100 for step in range(5, 101, 5))),
    "batch": ("sequences", range(1, 4097)),
    "length": ("tokens", range(128, 2**20 + 1, 128)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    arguments, subject = parse(argv)
    run = estimator_for(arguments, subject)
    report = {"settings": settings_of(arguments, subject)}
    if arguments.estimation.find is not None:
        report["find"] = find(arguments, subject, run)
    else:
        rows = []
        for row in estimate(arguments, subject, run):
            print(f"{row.weights}, {row.method}: {row.seconds:.1f} s", file=sys.stderr)
            rows.append(row)
        print_table(rows, arguments, subject)
        report["rows"] = [row.as_dict() for row in rows]
    if arguments.estimation.json is not None:
        write_whole(Path(arguments.estimation.json), json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> tuple[EstimateArguments, Subject]:
    """The command's own flags with `finetune.py`'s, of which only the model is needed, and what they are asked of."""
    logging.getLogger("tokentune").setLevel(logging.ERROR)  # of flags without effect in the mode that is marked
    given = flags_given(argv, EstimateArguments)
    arguments = parse_arguments(argv, EstimateArguments)
    name = arguments.model.model_name_or_path
    subject = load_subject(name, trust_remote_code=arguments.model.trust_remote_code)
    check_quantization(subject.config, name, qlora=arguments.adapters.qlora)
    if {"global_batch_size", "gradient_accumulation_steps"} & given.keys():
        processes, optimization = arguments.estimation.num_processes, arguments.optimization
        sequences, left_over = divmod(optimization.micro_batch_size, processes)
        if sequences == 0 or left_over:
            raise UserError(
                f"--global_batch_size {optimization.global_batch_size}: its micro-batches of "
                f"{optimization.micro_batch_size} cannot be shared by --num_processes {processes}"
            )
        subject = dataclasses.replace(subject, sequences=sequences)
    if "max_length" in given:
        subject = dataclasses.replace(subject, length=arguments.data.max_length)
    if subject.head is not CAUSAL_LM and "lora_target_modules" not in given:
        arguments.adapters.lora_target_modules = ["all-linear"]  # the default's names are those of decoders
    if isinstance(arguments.selection.selected, Answers):
        arguments.selection.check_answers()
        subject = with_answers(subject, arguments, length_is_given="max_length" in given)
    elif arguments.estimation.answer_share is not None:
        raise UserError("--answer_share is for --prefix_length answers: add that, or leave it out")
    if "prefix_length" not in given:
        arguments.selection.prefix_length, arguments.selection.selected = "0.3", 0.3
    if not arguments.selection.tokentune and arguments.memory.chunked_loss == "off":
        arguments.memory.chunked_loss = "auto"  # the same in ordinary training
    return arguments, subject


# --- the table --------------------------------------------------------------------------------------------------------


def estimator_for(arguments: EstimateArguments, subject: Subject) -> Estimate:
    """What runs the steps of this command."""
    own = arguments.estimation
    sharing = {"processes": own.num_processes, "engine": own.sharding}
    return estimator(subject.config, own.device, subject.head, answer_share=subject.answer_share, **sharing)


def estimate(arguments: EstimateArguments, subject: Subject, run: Estimate) -> Iterator[Row]:
    """The table's rows, one by one."""
    for weights in WEIGHTS:
        for method, flags in METHODS.items():
            if flags.get("chunked_loss") == "on" and subject.head is not CAUSAL_LM:
                continue  # a classifier's few logits are not taken in chunks
            changed = with_mode(arguments, method, weights)
            chosen = changed == arguments
            if arguments.estimation.only and not chosen:
                continue
            started = time.perf_counter()
            footprint, reason = None, None
            try:
                footprint = run(changed, (subject.sequences, subject.length))
            except UserError as error:
                reason = str(error)
            yield Row(method, weights, chosen, footprint, reason, time.perf_counter() - started)


def with_mode(arguments: EstimateArguments, method: str, weights: str) -> EstimateArguments:
    """The same flags, but for those that choose the table's row."""
    return arguments.changed(**METHODS[method], **WEIGHTS[weights])


# --- the largest that fits --------------------------------------------------------------------------------------------


def find(arguments: EstimateArguments, subject: Subject, run: Estimate) -> dict[str, Any]:
    """The largest proportion of selected tokens, batch or length that fits the card, in the mode that the flags choose.

    Raises:
        UserError: not even the smallest fits, or a mode that this cannot be asked of.
    """
    asked, memory_gb = arguments.estimation.find, arguments.estimation.memory
    sequences, length = subject.sequences, subject.length
    if asked == "proportion" and not arguments.selection.tokentune:
        raise UserError("--find proportion is about selected tokens: add --tokentune")
    if asked == "proportion" and arguments.selection.takes_answers:
        raise UserError("--find proportion tries numbers: leave --prefix_length answers out")
    unit, values = TRIED[asked]
    positions = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if asked == "length" and positions is not None:
        values = range(values[0], min(positions, values[-1]) + 1, values.step) or (positions,)

    def step(value: Any, depth: int | None = None) -> Footprint:
        if asked == "proportion":
            return run(arguments.changed(selected=value, prefix_length=str(value)), (sequences, length), depth)
        return run(arguments, (value, length) if asked == "batch" else (sequences, value), depth)

    def told(value: Any, how: str, peak: float) -> None:
        fits = "fits" if fits_card(peak, memory_gb) else "does not fit"
        print(f"{unit} {value}: peak {in_gib(peak)} GiB, {how}, {fits}", file=sys.stderr)

    def measured(value: Any) -> Footprint:
        footprint = step(value)
        told(value, "all layers", footprint.peak)
        return footprint

    def from_few_layers(value: Any) -> float:
        peak = predicted(subject.config, lambda depth: step(value, depth).peak)
        told(value, "predicted from few layers", peak)
        return peak

    reason = why_not_predictable(subject.config, arguments, subject.head)
    if reason is not None:
        print(f"all layers are run for each {asked}: {reason}", file=sys.stderr)
    start = predicted_start(values, from_few_layers, memory_gb) if reason is None else 0
    best, footprint, tried = largest(values, measured, memory_gb, start)
    if best is None:
        raise UserError(
            f"--memory {memory_gb:g}: not even {unit} {values[0]} fits, whose peak is {in_gib(footprint.peak)} GiB. "
            + what_saves(arguments)
        )
    name = {
        "proportion": f"--prefix_length {best}",
        "batch": f"{best} sequences of {length} tokens",
        "length": f"{sequences} x {best} tokens",
    }[asked]
    bound = ""
    if best == values[-1]:
        of_model = asked == "length" and values is not TRIED[asked][1]
        bound = f" (the model was made for at most {positions} positions)" if of_model else " (the most that was tried)"
    print(f"largest {asked} for {memory_gb:g} GB: {name}{bound}, peak {in_gib(footprint.peak)} GiB")
    return {asked: best, "memory_gb": memory_gb, "bytes": footprint.as_dict(), "steps_run": tried}


def what_saves(arguments: EstimateArguments) -> str:
    """What would need less memory, of what is not asked for already."""
    given = {
        "--tokentune": arguments.selection.tokentune,
        "--gradient_checkpointing": arguments.memory.gradient_checkpointing,
        "--lora": arguments.adapters.lora,
        "--qlora": arguments.adapters.qlora,
        "a shorter --max_length": arguments.estimation.find == "length",
    }
    left = [cure for cure, has in given.items() if not has]
    return f"Try {' or '.join(left)}." if left else "It takes a smaller model, or a card with more memory."


if __name__ == "__main__":
    run_command(main)
