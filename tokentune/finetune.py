"""Command: fine-tune a causal language model, with gradients for selected tokens, adapters, both or neither.

    python -u ./tokentune/finetune.py \
        --model_name_or_path meta-llama/Llama-3.2-1B \
        --dataset_name_or_path garage-bAInd/Open-Platypus \
        --global_batch_size 32 --gradient_accumulation_steps 32 \
        --warmup_steps 100 --learning_rate 4e-4 --bf16 \
        --lora --tokentune --prefix_length 0.3

The model, or with adapters the adapter alone, lands in `./models/<model>-<data>-lora-tokentune-0.3/`, with the
tokenizer, `training_summary.json` and `training_curves.png`. `--help all` lists every flag. Bad input ends with one
sentence and exit code 2, before any weight is read and before anything is written.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("finetune")  # before the imports below, which take seconds

from transformers import set_seed

from tokentune.cli.answers import answered, run_folder_of
from tokentune.cli.arguments import parse_arguments
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.cli.config_file import write_config
from tokentune.cli.preview import read_inputs
from tokentune.core.layers import inner_model
from tokentune.data.chat.templates import stop_at_end
from tokentune.data.inspection.checks import check_data
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.packing import pack
from tokentune.data.packing_check import check_separation
from tokentune.data.streaming_rows import seeded_rows
from tokentune.environment import library_versions
from tokentune.memory.dry_run import say_plan
from tokentune.memory.probe import choose_micro_batch, probe_memory
from tokentune.memory.report import memory_watched
from tokentune.models.builder import base_dtype, check_structure, prepare_model, saved_as, unsupported_models_refused
from tokentune.phases import phase, start_clock
from tokentune.reports.hub_upload import check_push, push_folder
from tokentune.reports.model_card import write_model_card
from tokentune.reports.next_steps import say_next_steps
from tokentune.reports.summary import build_summary, draw_curves, warn_without_gain, write_summary
from tokentune.settings.finetune import Arguments
from tokentune.training.build import build_trainer
from tokentune.training.checkpoints.disk_space import disk_space
from tokentune.training.checkpoints.resuming import prepare_run_folder, train_to_the_end, what_to_resume
from tokentune.training.checkpoints.run_folder import check_run_folder
from tokentune.training.checkpoints.run_lock import locked
from tokentune.training.checkpoints.saving import remove_best_checkpoints
from tokentune.training.distributed.interruptions import interruptible
from tokentune.training.distributed.peers import end_when_stuck
from tokentune.training.result import save_result
from tokentune.training.trainer_arguments import build_training_arguments

logger = logging.getLogger("tokentune")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    arguments = parse_arguments(argv)
    if answered(arguments):
        return
    run_folder = run_folder_of(arguments)
    start_clock()
    with interruptible(), end_when_stuck(), locked(run_folder) if not arguments.run.dry_run else nullcontext():
        fine_tune(arguments, run_folder, sys.argv[1:] if argv is None else argv)


def fine_tune(arguments: Arguments, run_folder: Path, words: Sequence[str]) -> None:
    """The run itself. `words`: the command line that it was asked for with."""
    # Whatever can be refused is refused here: nothing has been written, no weight read.
    check_push(arguments.run.push_to_hub, run_folder)
    flags = arguments.settings()
    start = what_to_resume(flags, run_folder)
    there = check_run_folder(run_folder, flags, resuming=start.in_place)
    settings = build_training_arguments(arguments, run_folder)
    with phase("read"):
        inputs = read_inputs(arguments)
        config, tokenizer = inputs.config, inputs.tokenizer
        dtype = base_dtype(arguments, config)
        skeleton = check_structure(arguments, config)
        if arguments.data.packing:
            check_separation(skeleton)
    with phase("tokenize"):
        data = load_instruction_data(arguments, tokenizer, inputs.template)
        arguments.set_invocation(data.invocation)
        findings = check_data(data, tokenizer, arguments, inputs.vocab_size)
    tokenizer.chat_template = data.chat_template

    set_seed(arguments.optimization.seed)
    with phase("load"), memory_watched(arguments, config):
        model = prepare_model(arguments, dtype)
    stop_at_end(inner_model(model).generation_config, tokenizer)
    rows = seeded_rows(data.train, arguments.optimization.seed)
    if arguments.data.packing:
        rows = pack(rows, arguments.data.max_length)
    with unsupported_models_refused():
        trainer = build_trainer(model, settings, rows, data.validation, tokenizer, arguments)
        saved_dtype = saved_as(arguments, config, dtype)
        space = disk_space(trainer, run_folder, saved_dtype, start)
        if not arguments.run.dry_run:
            space.check()
        with phase("probe"):
            choose_micro_batch(trainer, arguments, config, start.checkpoint)
            if not arguments.run.dry_run:
                probe_memory(trainer, arguments, config)
        if arguments.run.dry_run:
            said = {"train data": data.train_report, "validation data": data.validation_report}
            said |= {"selection": findings.gain, "disk": space, "there already": there}
            say_plan(trainer, data.table, said, arguments, config, run_folder)
            return
    if trainer.is_world_process_zero():
        prepare_run_folder(run_folder, start)
        write_config(arguments, run_folder, words, library_versions(), trainer.auto_values)
    with phase("train"), unsupported_models_refused(), memory_watched(arguments, config, trainer):
        train_to_the_end(trainer, start)

    with phase("save"):
        facts = save_result(trainer, run_folder, saved_dtype) | {"base_dtype": str(dtype).removeprefix("torch.")}
    if trainer.is_world_process_zero():
        summary = build_summary(trainer, arguments, data, facts)
        draw_curves(summary, run_folder)
        write_model_card(summary, run_folder)
        write_summary(summary, run_folder)  # last: it marks a finished run
        warn_without_gain(summary)
        if arguments.run.load_best_model_at_end:
            remove_best_checkpoints(run_folder, arguments.output.save_steps)
        logger.info("saved in %s", run_folder)
        if arguments.run.push_to_hub is not None:
            address = push_folder(run_folder, arguments.run.push_to_hub, public=arguments.run.hub_public)
            logger.info("uploaded to %s", address)
        say_next_steps(arguments, run_folder)


if __name__ == "__main__":
    run_command(main)
