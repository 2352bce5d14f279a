"""The command line of `finetune.py`: every flag, in groups, each with its check beside it.

    python -u ./tokentune/finetune.py --help

Names, defaults and meanings are those of the released TokenTune scripts; what this project adds says so in its help.
Each group is a dataclass (`settings/model.py`, `settings/data.py`, `settings/run.py`): its fields are its flags, and
`__post_init__` refuses what cannot work, in a sentence that names the flag. `parse_arguments` turns a command line into
one `Arguments`, or into another command's: a dataclass derived from it, whose groups are these ones or derived from
them (`settings/classification.py`). `--config` reads flags from a file first (`cli/config_file.py`).
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from tokentune.processes import engine
from tokentune.sampling.schedule import Answers
from tokentune.settings.data import DataArguments
from tokentune.settings.engines import check_engine
from tokentune.settings.flags import AUTO, log_without_effect, require
from tokentune.settings.model import AdapterArguments, MemoryArguments, ModelArguments, SelectionArguments
from tokentune.settings.run import OptimizationArguments, OutputArguments, RunArguments


@dataclass
class Arguments:
    """What the commands that train have in common."""

    prog: ClassVar[str]
    description: ClassVar[str]
    model: ModelArguments
    data: DataArguments
    selection: SelectionArguments
    memory: MemoryArguments
    adapters: AdapterArguments
    optimization: OptimizationArguments
    output: OutputArguments

    def __post_init__(self) -> None:
        require(
            self.adapters.lora or not (self.model.fp16 and self.model.base_dtype == "float16"),
            "--fp16 with --base_dtype float16 cannot train all weights (loss scaling needs float32 ones): "
            "leave --base_dtype out, or add --lora",
        )
        require(
            not (self.model.fp16 and self.optimization.optim_in_backward),
            "--optim_in_backward with --fp16: loss scaling looks at all gradients before one is applied; use --bf16",
        )
        require(
            not (self.adapters.lora and self.optimization.optim.startswith(("galore", "apollo"))),
            f"--optim {self.optimization.optim} projects gradients of whole weight matrices to a low rank, which those "
            "of adapters have already: leave --lora and --qlora out, or take another --optim",
        )
        if self.selection.tokentune:
            gaps = "the positions of selected tokens have gaps, so that attention needs a mask"
            self.model.require_masks("--tokentune", gaps)
        check_engine(self.prog, self.settings())
        if not self.selection.tokentune:
            log_without_effect(self.memory, ("checkpoint_rest", "offload_kv"), "--tokentune")

    def settings(self) -> dict[str, Any]:
        """Every flag's name and value, in one level."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def changed(self, **values: Any) -> Self:
        """A copy in which these flags, or what was read from them, have other values; they are not checked."""
        other = copy.deepcopy(self)
        for name, value in values.items():
            setattr(next(group for group in vars(other).values() if hasattr(group, name)), name, value)
        return other


@dataclass
class FinetuneArguments(Arguments):
    """A whole command line of `finetune.py`."""

    prog: ClassVar[str] = "finetune.py"
    description: ClassVar[str] = "Fine-tune a causal language model."
    common: ClassVar[str] = (  # what most runs need, which `--help` lists
        "model_name_or_path bf16 dataset_name_or_path max_length chat_template add_eos_token packing eval_fraction "
        "eval_dataset_name_or_path eval_steps tokentune prefix_length selection gradient_checkpointing lora qlora "
        "lora_r lora_alpha lora_target_modules global_batch_size gradient_accumulation_steps num_epochs max_steps "
        "learning_rate warmup_steps model_save_path run_name overwrite_output_dir save_steps logging_steps preview "
        "dry_run resume_from_checkpoint"
    )
    run: RunArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        data, run = self.data, self.run
        validates = data.eval_dataset_name_or_path is not None or data.eval_fraction is not None
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            require(
                not getattr(run, name) or (validates and data.eval_steps is not None),
                f"--{name} looks at the validation loss: add --eval_steps, and --eval_dataset_name_or_path or "
                "--eval_fraction",
            )
        require(
            not run.auto_micro_batch or self.optimization.gradient_accumulation_steps in (AUTO, 1),
            "--auto_micro_batch finds the accumulation itself: leave --gradient_accumulation_steps out",
        )
        require(
            not (run.auto_micro_batch and self.optimization.optim_in_backward),
            "--auto_micro_batch has nothing to find beside --optim_in_backward, whose micro-batch is the global batch: "
            "leave it out, and choose --global_batch_size",
        )
        require(
            not (run.auto_micro_batch and data.streaming),
            "--auto_micro_batch cannot change the batches of --streaming, which are made as they are read: give "
            "--gradient_accumulation_steps",
        )
        if run.auto_micro_batch:
            self.optimization.gradient_accumulation_steps = AUTO
        self._check_packing()
        self._check_diagnosing()
        if self.adapters.invocation is not None:
            self._check_lora_on_answers()
        require(
            not data.streaming or self.optimization.max_steps is not None,
            "--streaming cannot know how many rows there are: add --max_steps",
        )

    def _check_diagnosing(self) -> None:
        """There has to be a moment at which whole gradients are there, in one process."""
        steps, optimization = self.selection.diagnose_steps, self.optimization
        if steps is None:
            return
        flag = f"--diagnose_steps {steps}"
        require(self.prog == "finetune.py", f"{flag} is for finetune.py: leave it out")
        require(
            not optimization.optim_in_backward and "lomo" not in optimization.optim,
            f"{flag} compares whole gradients, of which an optimizer in the backward pass leaves none: drop "
            "--optim_in_backward, or take another --optim",
        )
        require(not self.model.fp16, f"{flag} with --fp16: gradients are there scaled alone; use --bf16, or neither")
        require(
            engine() is None,
            f"{flag} compares gradients within one process, and {engine()} adds them up over several: try it without "
            "the launcher, on fewer rows",
        )

    def _check_lora_on_answers(self) -> None:
        """Where all that adapters act on is selected, and nothing else, the gradient is that of all tokens."""
        selection, data = self.selection, self.data
        require(
            not selection.tokentune or (selection.schedule is None and selection.selected == Answers()),
            f"--lora_on answers with --prefix_length {selection.prefix_length}: adapters act on all of an answer and "
            "nothing else; take --prefix_length answers, or --lora_on all",
        )
        require(
            selection.diagnose_steps is None and self.prog != "diagnose.py",
            "--lora_on answers: its gradient is that of all tokens, so that there is nothing to compare. Leave "
            "--diagnose_steps out, or take --lora_on all",
        )
        for name, why in (
            ("packing", "peft looks for one answer in each row"),
            ("streaming", "each answer becomes a row, and a stream does not know how many there are"),
        ):
            require(not getattr(data, name), f"--{name} with --lora_on answers: {why}; leave one of them out")

    def set_invocation(self, invocation: tuple[int, ...] | None) -> None:
        """With `--lora_on answers`, the tokens in front of an answer: from there adapters act, and all is selected."""
        if invocation is not None:
            self.adapters.invocation = invocation
        if invocation is not None and isinstance(self.selection.selected, Answers):
            self.selection.selected = replace(self.selection.selected, invocation=invocation)

    def _check_packing(self) -> None:
        """A packed row draws for each of its documents, which only the one who packs them can tell apart."""
        selection = self.selection
        if not self.data.packing:
            return
        self.model.require_masks("--packing", "the documents of a row are kept apart by a mask")
        if not selection.tokentune:
            return
        require(
            not selection.scored,
            f"--packing with --selection {selection.selection}: the model draws then, for whole rows, and would leave "
            "some of the documents in a row without a selected token; leave --packing out, or take a --selection "
            "without scores",
        )
        require(
            selection.schedule is None,
            f"--packing with --prefix_length {selection.prefix_length}: packed rows are drawn for before their "
            "optimizer step is known; give one size, or leave --packing out",
        )
