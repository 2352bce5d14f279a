"""Command: fine-tune an encoder to classify texts, words or images, with gradients for selected tokens or for all.

    python ./tokentune/classify.py \
        --model_name_or_path google-bert/bert-base-uncased --task_name mrpc --seeds 1 2 3 \
        --tokentune --prefix_length 32

The best checkpoint of each seed lands in `./models/<model>-<data>-<task>-tokentune-32/seed-1/` and so on, with the
tokenizer, `training_summary.json` and `training_curves.png`; the scores' mean and deviation in
`classification_summary.json` above them. `--help all` lists every flag. Bad input ends with one sentence and exit code
2, before any weight is read and before anything is written.
"""

import copy
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("classify")  # before the imports below, which take seconds

from transformers import PreTrainedConfig, set_seed

from tokentune.cli.answers import answered, run_folder_of
from tokentune.cli.arguments import parse_arguments
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.cli.config_file import write_config
from tokentune.core.patched import profile_of
from tokentune.core.profile import Pooling, pad_token
from tokentune.data.collators import SeededRows
from tokentune.data.labelled.splits import ClassificationData, configured, load_data, load_processing
from tokentune.environment import library_versions
from tokentune.errors import UserError
from tokentune.file_names import SCORES_NAME
from tokentune.memory.report import memory_watched
from tokentune.models.builder import base_dtype, check_structure, prepare_model, saved_as, unsupported_models_refused
from tokentune.models.pretrained import check_quantization, load_config
from tokentune.models.tasks import HEADS
from tokentune.phases import phase, start_clock
from tokentune.reports.classification_summary import (
    best_folder,
    said,
    scores_over_seeds,
    seed_summary,
    write_predictions,
)
from tokentune.reports.model_card import write_model_card
from tokentune.reports.next_steps import say_next_steps
from tokentune.reports.summary import draw_curves, write_summary
from tokentune.settings.classification import ClassificationArguments, TaskArguments
from tokentune.training.checkpoints.run_folder import check_run_folder, clear_run_folder
from tokentune.training.checkpoints.run_lock import locked
from tokentune.training.checkpoints.saving import remove_best_checkpoints
from tokentune.training.classification import build_classification_trainer, classification_settings, predict
from tokentune.training.distributed.interruptions import interruptible
from tokentune.training.distributed.peers import end_when_stuck
from tokentune.training.result import save_result
from tokentune.training.scores import metric_names

logger = logging.getLogger("tokentune")

AGAIN = "Nothing of it can be gone on with: start it again, with --overwrite_output_dir."


@dataclass
class Plan:
    """What every seed's training starts from: all that could be refused has been looked at."""

    arguments: ClassificationArguments
    config: PreTrainedConfig
    processing: Any  # the tokenizer, or the image processor
    data: ClassificationData
    metric: str
    run_folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    arguments = parse_arguments(argv, ClassificationArguments)
    if answered(arguments):
        return
    run_folder = run_folder_of(arguments)
    start_clock()
    with interruptible(AGAIN), end_when_stuck(), locked(run_folder):
        plan = prepare(arguments, run_folder)
        summaries = [train(plan, seed) for seed in arguments.seeds]
        scores = scores_over_seeds(summaries, arguments, plan.data.labels)
        write_config(arguments, run_folder, sys.argv[1:] if argv is None else argv, library_versions())
        write_summary(scores, run_folder, SCORES_NAME)  # last: it marks a finished run
        logger.info("%s; saved in %s", said(scores), run_folder)
        say_next_steps(arguments, best_folder(scores), inputs=plan.data.inputs)


def prepare(arguments: ClassificationArguments, run_folder: Path) -> Plan:
    """Whatever can be refused is refused here: nothing has been written, no weight read."""
    head = HEADS[arguments.task.task_type]
    check_run_folder(run_folder, arguments.settings())
    classification_settings(arguments, run_folder, "loss")
    name, trusted = arguments.model.model_name_or_path, arguments.model.trust_remote_code
    with phase("read"):
        config = load_config(name, head=head, trust_remote_code=trusted)
        check_quantization(config, name, qlora=arguments.adapters.qlora)
        processing = load_processing(arguments, config)
    with phase("tokenize"):
        data = load_data(arguments, config, processing)
    metric = chosen_metric(arguments.task, data)
    config = configured(config, data.labels, processing)
    skeleton = check_structure(arguments, config, head)
    if arguments.selection.tokentune:
        say_pooling(skeleton, name, arguments.task.task_type, processing)
    return Plan(arguments, config, processing, data, metric, run_folder)


def chosen_metric(task: TaskArguments, data: ClassificationData) -> str:
    """--metric_for_best_model, or the task's own. Raises UserError where the task has no such metric."""
    known = metric_names(task.task_type, data.labels)
    if task.metric_for_best_model is None:
        return known[0] if task.glue is None else task.glue.metric
    chosen = task.metric_for_best_model.removeprefix("eval_")
    if chosen not in known:
        raise UserError(f"--metric_for_best_model {chosen}: this task has {', '.join(known)}.")
    return chosen


def say_pooling(skeleton: Any, name: str, task_type: str, processing: Any) -> None:
    """Says what the head for whole sequences looks at in training. Evaluation is the ordinary forward pass."""
    pooling = profile_of(skeleton).pooling
    if task_type == "token":
        logger.info("every selected word is classified; evaluation classifies all words")
    elif pooling is None:
        raise UserError(
            f"--model_name_or_path {name}: its head pools no token that could be "
            "selected. Take another model, or leave --tokentune out."
        )
    elif pooling is Pooling.ALL:
        logger.info(
            "the head pools all tokens: in training too it gets the whole sequence, the tokens that are not selected "
            "as constants; evaluation is the ordinary forward pass"
        )
    else:
        theirs, own = getattr(processing, "pad_token_id", None), pad_token(skeleton)
        if pooling is Pooling.LAST_NON_PAD and theirs != own:
            raise UserError(
                f"--model_name_or_path {name}: its head looks for the last token that is "
                f"not number {own} (pad_token_id in config.json), and its tokenizer pads with number {theirs}: "
                "the head would pool padding. Give both the same number."
            )
        logger.info("the head pools the %s token, which is always selected", pooling.value)


def train(plan: Plan, seed: int) -> dict[str, Any]:
    """One seed's training: the best checkpoint, its summary and predictions in their folder. Returns the summary."""
    arguments = copy.deepcopy(plan.arguments)
    arguments.optimization.seed = seed
    several = len(arguments.seeds) > 1
    folder = plan.run_folder / f"seed-{seed}" if several else plan.run_folder
    settings = classification_settings(arguments, folder, plan.metric)
    dtype = base_dtype(arguments, plan.config)
    set_seed(seed)
    with phase("load"):
        model = prepare_model(
            arguments,
            dtype,
            HEADS[arguments.task.task_type],
            copy.deepcopy(plan.config),
            from_scratch=arguments.model.from_scratch,
        )
    if settings.process_index == 0:
        clear_run_folder(folder if several and seed != arguments.seeds[0] else plan.run_folder)
    rows = SeededRows(plan.data.train.rows, seed)
    trainer = build_classification_trainer(
        model, settings, rows, plan.data.validation.rows, plan.processing, arguments, plan.data.labels
    )
    head = HEADS[arguments.task.task_type]
    with phase("train"), unsupported_models_refused(), memory_watched(arguments, plan.config, trainer, head):
        trainer.train()

    if plan.data.test is not None and trainer.is_world_process_zero():
        with phase("evaluate"):
            write_predictions(predict(trainer, plan.data.test.rows, plan.data.labels), folder)
    with phase("save"):
        facts = save_result(trainer, folder, saved_as(arguments, plan.config, dtype))
    facts["base_dtype"] = str(dtype).removeprefix("torch.")
    splits = {"train": plan.data.train, "validation": plan.data.validation, "test": plan.data.test}
    summary = seed_summary(trainer, arguments, splits, facts, plan.metric)
    if trainer.is_world_process_zero():
        draw_curves(summary, folder, loss_unit="squared error" if plan.data.labels.is_regression else "nats per label")
        write_model_card(summary, folder)
        write_summary(summary, folder)
        remove_best_checkpoints(folder, arguments.output.save_steps)
    return summary


if __name__ == "__main__":
    run_command(main)
