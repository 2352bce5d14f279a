"""Every flag of `classify.py`: the groups of `settings/finetune.py`, with defaults for encoders, and what a task adds.

python ./tokentune/classify.py --help
"""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

from tokentune.sampling.meanings import UNSCORED, in_words
from tokentune.sampling.schedule import Answers
from tokentune.settings.data import RowsArguments
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import REQUIRED, Group, default_of, flag, require
from tokentune.settings.glue import HUB_ID, TASKS, GlueTask
from tokentune.settings.model import AdapterArguments, ModelArguments, SelectionArguments
from tokentune.settings.run import OptimizationArguments, OutputArguments, WatchedRunArguments

logger = logging.getLogger(__name__)
_CAUSAL_ALONE = (
    "selection_pass",
    "selection_draw",
    "selection_layers",
    "selection_reference_model",
    "gradient_correction",
    "diagnose_steps",
)


@dataclass
class EncoderArguments(ModelArguments):
    """Which model, and how its weights are held."""

    model_name_or_path: str = flag(
        REQUIRED,
        "hub id or local folder of an encoder (BERT, RoBERTa, ModernBERT, ViT, ...), with or without "
        "a classification head: a missing one is new",
    )
    from_scratch: bool = flag(
        False,
        "random weights for the model's config.json: nothing pretrained is read (its tokenizer or image processor is)",
    )


@dataclass
class TaskArguments(Group):
    """What is predicted."""

    _argument_group_name = "task"
    task_type: Literal["text", "token", "image"] = flag(
        "text", "what gets a label: a text or a pair of texts, each word of a text, an image"
    )
    task_name: str | None = flag(None, f"a GLUE task, for its columns, classes and metric: {', '.join(TASKS)}")
    text_columns: list[str] = flag(
        [],
        "one or two columns of text (token: the one of words; image: the one of images); by default "
        "GLUE's names, then the only ones there are",
    )
    label_column: str | None = flag(
        None,
        "column of classes (whole numbers or texts) or of a number to predict (with a fraction); by default "
        "label or labels (token: also ner_tags, tags)",
    )
    metric_for_best_model: str | None = flag(
        None,
        "which validation figure chooses the checkpoint that is kept: accuracy, f1, matthews_correlation, "
        "pearson, spearman, mean_squared_error, precision, recall, loss; by default the task's own",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_name is not None:
            require(
                self.task_name in TASKS, f"--task_name {self.task_name}: no GLUE task; choose from {', '.join(TASKS)}"
            )
            require(
                self.task_type == "text",
                f"--task_name {self.task_name} classifies texts: it does not go with --task_type {self.task_type}",
            )
        most = 2 if self.task_type == "text" else 1
        require(
            len(self.text_columns) <= most,
            f"--text_columns {' '.join(self.text_columns)}: --task_type {self.task_type} takes at most {most}",
        )

    @property
    def glue(self) -> GlueTask | None:
        """The GLUE task that is named, if any."""
        return TASKS[self.task_name] if self.task_name is not None else None

    @property
    def name(self) -> str:
        """The task in a run's name and report."""
        return self.task_name or self.task_type


@dataclass
class LabelledRowsArguments(RowsArguments):
    """Which rows are learnt from, evaluated on and predicted."""

    dataset_name_or_path: str | None = flag(
        None,
        "hub id, or local .json, .jsonl, .csv or .parquet file or folder (image: also a folder with one "
        f"subfolder of images per class); with --task_name by default {HUB_ID} on the hub",
    )
    max_length: int = flag(128, "tokens per sequence; longer ones are cut at the end (a pair: the longer text)")
    eval_dataset_name_or_path: str | None = flag(
        None, "validation data, as the training data; by default that data set's validation split"
    )
    eval_steps: int | None = flag(None, "optimizer steps between evaluations; by default one after each epoch")
    test_dataset_name_or_path: str | None = flag(
        None,
        "data whose predictions by the best checkpoint are written to predictions.jsonl; where it has labels, "
        "they get a score",
    )
    test_dataset_split: str | None = flag(None, "as --dataset_split, of the test data")
    test_dataset_config: str | None = flag(None, "as --dataset_config, of the test data")
    max_train_rows: int | None = flag(
        None, "learn from so many rows of the training data, drawn once and the same for every seed", least=2
    )


@dataclass
class LabelledSelectionArguments(SelectionArguments):
    """TokenTune itself: gradients for a subset of the tokens."""

    selection: str = flag(
        "random",
        f"how they are chosen: {in_words(UNSCORED)}; or by a function of your own, file.py:function. "
        "labelled is another name of supervised, for --task_type token alone",
    )

    def __post_init__(self) -> None:
        for name in _CAUSAL_ALONE:
            require(
                getattr(self, name) == default_of(self.__dataclass_fields__[name]),
                f"--{name} is for causal language models (finetune.py): leave it out",
            )
        super().__post_init__()
        require(
            self.schedule is None,
            f"--prefix_length {self.prefix_length}: a size that changes over the run is for causal language models "
            "(finetune.py): give one size",
        )

    def _check_scores(self, needs: tuple[str, ...]) -> None:
        require(
            not needs,
            f"--selection {self.selection} is for causal language models (finetune.py): it needs the "
            f"{' and '.join(needs)} of each token; take one without scores",
        )


@dataclass
class EncoderAdapterArguments(AdapterArguments):
    """LoRA; a new head is trained whole."""

    lora_target_modules: list[str] = flag(["all-linear"])

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora_on == "all", "--lora_on answers is for finetune.py: an encoder has no answers")


@dataclass
class EncoderOptimizationArguments(OptimizationArguments):
    """How the weights move."""

    global_batch_size: int = flag(32)
    gradient_accumulation_steps: int = flag(
        1, "micro-batches per optimizer step; a micro-batch holds global batch / accumulation / devices sequences"
    )
    num_epochs: int = flag(3)
    learning_rate: float = flag(2e-5, "peak learning rate (with adapters, or from scratch: try 5e-4)")
    warmup_steps: float | Literal["auto"] = flag(0.1)
    lr_scheduler_type: str = flag("linear")
    seeds: list[int] = flag(
        [],
        "train once with each of these seeds, into seed-1/, seed-2/, ..., and report mean and "
        "standard deviation; by default --seed alone",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(set(self.seeds)) == len(self.seeds), f"--seeds {self.seeds}: one seed occurs twice")


@dataclass
class BestOutputArguments(OutputArguments):
    """What is written, where and how often."""

    save_steps: int = flag(50000, "optimizer steps between checkpoints, beside the best one's, which is always kept")
    save_total_limit: int = flag(1, "checkpoints to keep; older ones are deleted, but for the best")


@dataclass
class EncoderRunArguments(WatchedRunArguments):
    """How a run begins, is watched and ends."""

    early_stopping_patience: int | None = flag(None, "stop after so many evaluations in a row without a better score")


@dataclass
class ClassificationArguments(Arguments):
    """A whole command line of `classify.py`."""

    prog: ClassVar[str] = "classify.py"
    description: ClassVar[str] = "Fine-tune an encoder to classify texts, words or images."
    common: ClassVar[str] = (
        "model_name_or_path bf16 dataset_name_or_path max_length eval_dataset_name_or_path eval_steps "
        "test_dataset_name_or_path tokentune prefix_length selection gradient_checkpointing lora lora_r lora_alpha "
        "global_batch_size gradient_accumulation_steps num_epochs learning_rate warmup_steps seeds model_save_path "
        "run_name overwrite_output_dir logging_steps preview dry_run task"
    )
    model: EncoderArguments
    data: LabelledRowsArguments
    selection: LabelledSelectionArguments
    adapters: EncoderAdapterArguments
    optimization: EncoderOptimizationArguments
    output: BestOutputArguments
    run: EncoderRunArguments
    task: TaskArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.data.dataset_name_or_path is not None or self.task.task_name is not None,
            "no data: give --dataset_name_or_path, or --task_name for a GLUE task from the hub",
        )
        require(
            self.selection.selection not in ("labelled", "supervised") or self.task.task_type == "token",
            f"--selection {self.selection.selection} needs a label for each word: it does not go with --task_type "
            f"{self.task.task_type}",
        )
        answers = self.selection.tokentune and isinstance(self.selection.selected, Answers)
        require(
            not answers or self.task.task_type == "token",
            f"--prefix_length {self.selection.prefix_length} needs a label for each word: it does not go with "
            f"--task_type {self.task.task_type}",
        )
        require(
            not (self.data.group_by_length and self.task.task_type == "image"),
            "--group_by_length orders texts: it does not go with --task_type image, whose images are of one size",
        )
        require(
            not (self.model.from_scratch and self.adapters.lora),
            "--from_scratch with --lora would train adapters over random weights: leave one of them out",
        )
        require(
            not self.model.use_liger_kernel,
            "--use_liger_kernel: Liger has kernels for causal language models, none for encoders; leave it out",
        )
        require(
            self.run.push_to_hub is None or len(self.seeds) == 1,
            "--push_to_hub uploads one model, and --seeds trains several: give one of them with --seed",
        )

    @property
    def seeds(self) -> list[int]:
        """Of the runs, one after the other."""
        return self.optimization.seeds or [self.optimization.seed]
