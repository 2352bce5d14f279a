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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("classify")  # before the imports below, which take seconds

from accelerate import PartialState
from transformers import set_seed

from tokentune.cli.answers import answered, run_folder_of
from tokentune.cli.arguments import parse_arguments
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.cli.config_file import write_config
from tokentune.cli.labelled import LabelledInputs, read_labelled
from tokentune.data.collators import SeededRows
from tokentune.data.inspection.label_counts import label_counts
from tokentune.data.labelled.splits import ClassificationData
from tokentune.environment import library_versions
from tokentune.errors import UserError
from tokentune.file_names import SCORES_NAME
from tokentune.memory.dry_run import say_plan
from tokentune.memory.report import memory_watched
from tokentune.models.builder import base_dtype, prepare_model, saved_as, unsupported_models_refused
from tokentune.models.tasks import HEADS, Head
from tokentune.phases import phase, start_clock
from tokentune.reports.classification_summary import (
    best_folder,
    said,
    scores_over_seeds,
    seed_summary,
    write_predictions,
)
from tokentune.reports.hub_upload import check_push, push_folder
from tokentune.reports.model_card import write_model_card
from tokentune.reports.next_steps import say_next_steps
from tokentune.reports.summary import draw_curves, write_summary
from tokentune.settings.classification import ClassificationArguments, TaskArguments
from tokentune.training.checkpoints.disk_space import DiskSpace, disk_space
from tokentune.training.checkpoints.run_folder import check_run_folder, clear_run_folder
from tokentune.training.checkpoints.run_lock import locked
from tokentune.training.checkpoints.saving import remove_best_checkpoints
from tokentune.training.classification import build_classification_trainer, classification_settings, predict
from tokentune.training.distributed.interruptions import interruptible
from tokentune.training.distributed.peers import end_when_stuck
from tokentune.training.result import save_result
from tokentune.training.scores import metric_names, score_predictions
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger("tokentune")

AGAIN = "Nothing of it can be gone on with: start it again, with --overwrite_output_dir."


@dataclass
class Plan:
    """What every seed's training starts from: all that could be refused has been looked at."""

    arguments: ClassificationArguments
    inputs: LabelledInputs
    metric: str
    run_folder: Path
    held: str | None = None  # a run in that folder, which a dry run leaves as it is

    def of_seed(self, seed: int) -> "Plan":
        """The plan of one training; of several, each has a folder of its own below the run's."""
        folder = self.run_folder / f"seed-{seed}" if len(self.arguments.seeds) > 1 else self.run_folder
        return replace(self, arguments=self.arguments.changed(seed=seed), run_folder=folder)

    @property
    def head(self) -> Head:
        """Of the model, by what gets a label."""
        return HEADS[self.arguments.task.task_type]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    arguments = parse_arguments(argv, ClassificationArguments)
    if answered(arguments):
        return
    run_folder, run = run_folder_of(arguments), arguments.run
    start_clock()
    with interruptible(AGAIN), end_when_stuck(), locked(run_folder) if not run.dry_run else nullcontext():
        plan = prepare(arguments, run_folder)
        if run.dry_run:
            say_dry_run(plan)
            return
        summaries = [train(plan, seed) for seed in arguments.seeds]
        scores = scores_over_seeds(summaries, arguments, plan.inputs.data.labels)
        write_config(arguments, run_folder, sys.argv[1:] if argv is None else argv, library_versions())
        write_summary(scores, run_folder, SCORES_NAME)  # last: it marks a finished run
        logger.info("%s; saved in %s", said(scores), run_folder)
        if run.push_to_hub is not None and PartialState().is_main_process:
            logger.info("uploaded to %s", push_folder(run_folder, run.push_to_hub, public=run.hub_public))
        say_next_steps(arguments, best_folder(scores), inputs=plan.inputs.data.inputs)


def prepare(arguments: ClassificationArguments, run_folder: Path) -> Plan:
    """Whatever can be refused is refused here: nothing has been written, no weight read."""
    check_push(arguments.run.push_to_hub, run_folder)
    held = check_run_folder(run_folder, arguments.settings())
    classification_settings(arguments, run_folder, "loss")
    with phase("read"):
        inputs = read_labelled(arguments)
    return Plan(arguments, inputs, chosen_metric(arguments.task, inputs.data), run_folder, held)


def chosen_metric(task: TaskArguments, data: ClassificationData) -> str:
    """--metric_for_best_model, or the task's own. Raises UserError where the task has no such metric."""
    known = metric_names(task.task_type, data.labels)
    if task.metric_for_best_model is None:
        return known[0] if task.glue is None else task.glue.metric
    chosen = task.metric_for_best_model.removeprefix("eval_")
    if chosen not in known:
        raise UserError(f"--metric_for_best_model {chosen}: this task has {', '.join(known)}.")
    return chosen


def say_dry_run(plan: Plan) -> None:
    """Prints what the run would do; of several trainings, what each of them would."""
    data, seeds = plan.inputs.data, plan.arguments.seeds
    splits = {name: split for name, split in data.splits.items() if split is not None}
    told = {f"{name} data": split.report for name, split in splits.items()}
    for name, counts in label_counts(splits, data.labels).items():
        told[f"{name} labels"] = ", ".join(f"{label} {count}" for label, count in counts.items())
    told["seeds"] = " ".join(map(str, seeds)) if len(seeds) > 1 else None
    trainer = build(plan.of_seed(seeds[0]))
    told |= {"disk": space_of(plan, seeds[0], trainer), "there already": plan.held}
    say_plan(trainer, data.train.rows, told, plan.arguments, plan.inputs.config, plan.run_folder, plan.head)


def build(plan: Plan) -> SelectiveTrainer:
    """The trainer of one seed, with the model and its weights. Writes nothing."""
    arguments, inputs, seed = plan.arguments, plan.inputs, plan.arguments.optimization.seed
    settings = classification_settings(arguments, plan.run_folder, plan.metric)
    config = copy.deepcopy(inputs.config)
    set_seed(seed)
    with phase("load"):
        model = prepare_model(
            arguments, base_dtype(arguments, config), plan.head, config, from_scratch=arguments.model.from_scratch
        )
    rows = SeededRows(inputs.data.train.rows, seed)
    return build_classification_trainer(
        model, settings, rows, inputs.data.validation.rows, inputs.processing, arguments, inputs.data.labels
    )


def space_of(run: Plan, seed: int, trainer: SelectiveTrainer) -> DiskSpace:
    """On the disk, for one seed's training and the results of those after it."""
    arguments, config, number = run.arguments, run.inputs.config, run.arguments.seeds.index(seed)
    cleared = run.of_seed(seed).run_folder if number else run.run_folder
    saved_dtype = saved_as(arguments, config, base_dtype(arguments, config))
    return disk_space(trainer, cleared, saved_dtype, results=len(arguments.seeds) - number)


def train(run: Plan, seed: int) -> dict[str, Any]:
    """One seed's training: the best checkpoint, its summary and predictions in their folder. Returns the summary."""
    plan = run.of_seed(seed)
    arguments, config, data, folder = plan.arguments, plan.inputs.config, plan.inputs.data, plan.run_folder
    trainer = build(plan)
    space_of(run, seed, trainer).check()
    first = trainer.is_world_process_zero()
    if first:
        clear_run_folder(run.run_folder if seed == arguments.seeds[0] else folder)
    with phase("train"), unsupported_models_refused(), memory_watched(arguments, config, trainer, plan.head):
        trainer.train()

    with phase("evaluate"):
        test = predicted(trainer, plan) if data.test is not None and first else None
    dtype = base_dtype(arguments, config)
    with phase("save"):
        facts = save_result(trainer, folder, saved_as(arguments, config, dtype))
    facts["base_dtype"] = str(dtype).removeprefix("torch.")
    summary = seed_summary(trainer, arguments, data, facts, plan.metric, test)
    if first:
        draw_curves(summary, folder, loss_unit="squared error" if data.labels.is_regression else "nats per label")
        write_model_card(summary, folder)
        write_summary(summary, folder)
        remove_best_checkpoints(folder, arguments.output.save_steps)
    return summary


def predicted(trainer: SelectiveTrainer, plan: Plan) -> dict[str, Any] | None:
    """Writes the predictions of the test data; returns their score, None where the data has no labels."""
    test, labels, task_type = plan.inputs.data.test, plan.inputs.data.labels, plan.arguments.task.task_type
    predictions = list(predict(trainer, test.rows, labels))
    write_predictions(predictions, plan.run_folder)
    if test.truth is None:
        return None
    scores = score_predictions(task_type, predictions, test.truth, labels)
    metric = plan.metric if plan.metric in scores else next(iter(scores))  # these have no loss
    return {"metric": metric, "score": scores[metric], "metrics": scores}


if __name__ == "__main__":
    run_command(main)
