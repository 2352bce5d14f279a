"""Every flag of `diagnose.py`: those of `finetune.py` that a gradient depends on, and what is to be compared.

python ./tokentune/diagnose.py --help
"""

import copy
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tokentune.errors import UserError
from tokentune.processes import process_count
from tokentune.sampling.schedule import Answers, parse_prefix_length
from tokentune.settings import machine
from tokentune.settings.data import DataArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.flags import Group, default_of, flag, require
from tokentune.settings.model import AdapterArguments, MemoryArguments, ModelArguments, SelectionArguments
from tokentune.settings.run import OptimizationArguments, OutputArguments, RunArguments


def fixed(group: type, *, keep: tuple[str, ...] | None = None, **values: Any) -> type:
    """A group of flags in which `values` are no flags any more; `keep`: nor are others than these, with defaults."""
    attributes = group.__dataclass_fields__
    if keep is not None:
        others = {name: default_of(attribute) for name, attribute in attributes.items() if name not in keep}
        values = others | values
    held = [
        (name, attributes[name].type, field(default_factory=lambda value=value: value, init=False))
        for name, value in values.items()
    ]
    changed = make_dataclass(group.__name__, held, bases=(group,))
    # Without a flag the group has nothing to be described in the help.
    changed.__doc__ = "" if len(values) == len(attributes) else group.__doc__
    return changed


@dataclass
class DiagnosisArguments(Group):
    """What is compared with the gradient over all tokens."""

    _argument_group_name = "diagnosis"
    proportions: list[str] = flag(
        ["0.1", "0.2", "0.3", "0.5"],
        "of each row's tokens that are selected, one or several: numbers, and answers or answers+0.1 as of "
        "finetune.py's --prefix_length",
        metavar="NUMBER",
    )
    selections: list[str] = flag([], "how they are chosen, one or several of --selection's; by default that one alone")
    corrections: list[float] = flag(
        [0.0], "--gradient_correction, one or several: 0 is the paper's method, 1 full correction"
    )
    rows: int = flag(32, "training rows that the gradients are taken over, chosen by --seed", least=2)
    draws: int = flag(24, "times that tokens are drawn for each proportion, selection and correction", least=2)
    micro_batch_size: int = flag(8, "sequences per forward pass: memory is that of training with as many", least=1)
    output: str = flag(
        "diagnosis.json", "JSON file to write, over an older one too", metavar="FILE", filled="a JSON file"
    )
    full: bool = flag(False, "print every figure of every setting, as a table")
    figure: str | None = flag(
        None, "folder to draw the results in, as two PNG files", metavar="FOLDER", filled="a folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.proportions = [proportion_of(text) for text in self.proportions]
        for value in self.corrections:
            require(0 <= value <= 1, f"--corrections {value}: must lie between 0 (the paper's method) and 1 (full)")
        for name in ("proportions", "selections", "corrections"):
            values = getattr(self, name)
            twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
            require(twice is None, f"--{name}: {twice} occurs twice")
        output = Path(self.output).expanduser()
        require(not output.is_dir(), f"--output {self.output}: give a JSON file")
        require(output.resolve().parent.is_dir(), f"--output {self.output}: there is no such folder")
        if self.figure is not None:
            folder = Path(self.figure).expanduser()
            require(folder.is_dir() or not folder.exists(), f"--figure {self.figure} is a file: give a folder")


Proportion = float | str  # a number, or the text of `Answers`


def proportion_of(text: str) -> Proportion:
    """One of --proportions. Raises UserError."""
    with suppress(ValueError):
        value = float(text)
        require(0 < value <= 1, f"--proportions {value}: must be above 0 and at most 1")
        return value
    with suppress(ValueError):
        if isinstance(answers := parse_prefix_length(text), Answers):
            return str(answers)
    raise UserError(f"--proportions {text}: give numbers above 0 and at most 1 (0.3), answers, or answers+0.1")


def named(proportion: Proportion) -> str:
    """As a table shows it."""
    return proportion if isinstance(proportion, str) else f"{proportion:g}"


class Setting(NamedTuple):
    """One way to select, of those that are compared."""

    strategy: str
    correction: float
    proportion: Proportion

    def __str__(self) -> str:
        corrected = f", correction {self.correction:g}" if self.correction else ""
        return f"{self.strategy}{corrected}, {named(self.proportion)}"


class ComparedSelection(
    fixed(SelectionArguments, tokentune=True, prefix_length="0.3", gradient_correction=0.0, diagnose_steps=None)
):
    """TokenTune itself; what is said of scores is for those of --selections that have some."""

    def __post_init__(self) -> None:
        self.selected, self.schedule = 0.3, None  # the rest is checked with each strategy: `with_setting`


@dataclass
class DiagnoseArguments(FinetuneArguments):
    """A whole command line of `diagnose.py`."""

    prog: ClassVar[str] = "diagnose.py"
    description: ClassVar[str] = "Measure how good the selective gradient is, for a model and its data."
    common: ClassVar[str] = (
        "model_name_or_path bf16 dataset_name_or_path max_length chat_template add_eos_token selection "
        "gradient_checkpointing lora qlora lora_r seed diagnosis"
    )
    model: fixed(ModelArguments, fp16=False, fp16_opt_level="O1", model_parallel=False)
    data: fixed(
        DataArguments,
        num_workers=0,
        packing=False,
        streaming=False,
        group_by_length=False,
        eval_dataset_name_or_path=None,
        eval_fraction=None,
        eval_steps=None,
    )
    selection: ComparedSelection
    memory: fixed(MemoryArguments, report_memory=False, memory_snapshot=None)
    adapters: AdapterArguments
    optimization: fixed(OptimizationArguments, keep=("seed",), global_batch_size=1)
    output: fixed(OutputArguments, keep=(), report_to=[])
    run: fixed(RunArguments, keep=())
    diagnosis: DiagnosisArguments

    def __post_init__(self) -> None:
        super().__post_init__()
        require(process_count() == 1, "diagnose.py runs as one process: start it with python, not with a launcher")
        for setting in self.compared:
            self.with_setting(setting)  # for the checks of its flags

    @property
    def strategies(self) -> list[str]:
        """Those that are compared."""
        return self.diagnosis.selections or [self.selection.selection]

    @property
    def compared(self) -> list[Setting]:
        """All ways to select that are compared, proportions changing first."""
        asked = self.diagnosis
        return [
            Setting(strategy, correction, proportion)
            for strategy in self.strategies
            for correction in asked.corrections
            for proportion in asked.proportions
        ]

    def with_setting(self, setting: Setting) -> "DiagnoseArguments":
        """The command line of a run that selects in this way. Raises UserError where there is none."""
        changed = copy.deepcopy(self)
        selection = changed.selection
        selection.selection, selection.gradient_correction = setting.strategy, setting.correction
        selection.prefix_length = str(setting.proportion)
        # What another strategy takes is no mistake beside this one.
        needed = {need for strategy in self.strategies for need in needs_of(strategy)}
        own = needs_of(setting.strategy)
        if needed and not own:
            selection.selection_draw, selection.selection_layers = "proportional", None
        if "excess_loss" in needed and "excess_loss" not in own:
            selection.selection_reference_model = None
        try:
            SelectionArguments.__post_init__(selection)
        except UserError as error:
            said = str(error).replace("--prefix_length", "--proportions")
            if setting.strategy != self.selection.selection:
                said = said.replace("--selection ", "--selections ", 1)
            raise UserError(said) from None
        return changed


def needs_of(strategy: str) -> tuple[str, ...]:
    """The scores that a strategy needs; none where there is no such strategy, which its check will say."""
    try:
        return machine.needs_of(strategy)
    except UserError:
        return ()
