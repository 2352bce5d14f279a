"""Flags: the model, what of it keeps gradients, what is kept for the backward pass, and adapters."""

import logging
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Literal

from tokentune.errors import UserError
from tokentune.sampling.meanings import SCORED, UNSCORED, in_words
from tokentune.sampling.schedule import Answers, Schedule, parse_prefix_length
from tokentune.settings import machine
from tokentune.settings.flags import REQUIRED, Group, flag, log_without_effect, require

logger = logging.getLogger(__name__)

RUN_WITHOUT_DATA = ("sdpa", "eager")  # attention kernels; others are compiled code, which asks for real tensors


@dataclass
class ModelArguments(Group):
    """Which model, and how its weights are held."""

    _argument_group_name = "model"
    model_name_or_path: str = flag(
        REQUIRED, "hub id or local folder of a causal language model", filled="a hub id or a local folder"
    )
    base_dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag(
        "auto",
        "how the base's weights are held. auto: with adapters the checkpoint's own type; without, float32 masters, "
        "because 16-bit weights round small updates away (the result is then saved in the checkpoint's own type)",
    )
    bf16: bool = flag(False, "compute in bfloat16 (autocast)")
    fp16: bool = flag(False, "compute in float16 (autocast, with loss scaling)")
    fp16_opt_level: str = flag("O1", "obsolete (an option of NVIDIA Apex): accepted, does nothing")
    attn_implementation: str | None = flag(
        None, "attention kernels: sdpa, eager (slow, for checking), flex_attention (on a GPU); default: the model's own"
    )
    use_liger_kernel: bool = flag(
        False,
        "Liger's Triton kernels for norms, rotary embeddings and MLPs, on a GPU; with --tokentune the loss stays its "
        "own (--chunked_loss)",
    )
    model_parallel: bool = flag(False, "spread the base over the visible GPUs, layer by layer")
    offline: bool = flag(
        False,
        "ask the hub for nothing: models and data are local folders, or in its cache; wandb keeps its log for later",
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that comes with a model or tokenizer: it can do anything that you can"
    )
    allow_pickle: bool = flag(
        False, "where there is no safetensors file, read weights from pytorch_model.bin: tensors alone, no code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not (self.bf16 and self.fp16), "--bf16 and --fp16 exclude each other: give one of them")
        require(
            not self.fp16 or machine.has_accelerator(),
            "--fp16 needs a GPU (its loss scaling does not run on the CPU): use --bf16, or neither",
        )
        require(
            self.attn_implementation != "flex_attention" or machine.has_accelerator(),
            "--attn_implementation flex_attention needs a GPU (it has no backward pass on the CPU): use sdpa",
        )
        require(
            not (self.bf16 and machine.gpu_lacks_bfloat16()),
            "--bf16: this GPU cannot compute in bfloat16 (it takes Ampere or newer): use --fp16, or neither",
        )
        require(
            not self.use_liger_kernel or machine.has_gpu(),
            "--use_liger_kernel needs a GPU: its kernels are written in Triton, which compiles for nothing else",
        )
        require(
            not self.use_liger_kernel or machine.has_liger(),
            "--use_liger_kernel: the package is not installed; `pip install liger-kernel`",
        )
        if self.fp16_opt_level != "O1":
            logger.warning("--fp16_opt_level %s does nothing: mixed precision is torch's autocast", self.fp16_opt_level)
        if self.model_parallel and machine.gpu_count() < 2:
            logger.warning("--model_parallel changes nothing here: it takes two GPUs, %d visible", machine.gpu_count())

    def require_masks(self, flag: str, reason: str) -> None:
        """Refuses, UserError, attention kernels without the masks that `flag` needs, whether or not they are installed.

        Args:
            reason: what the masks are for: how the message goes on.
        """
        kernels = self.attn_implementation
        require(
            kernels is None or kernels in machine.masked_kernels(),
            f"--attn_implementation {kernels} with {flag}: {reason}, which only sdpa, eager and, on a GPU, "
            "flex_attention take. Use one of these, or leave it out.",
        )


@dataclass
class SelectionArguments(Group):
    """TokenTune itself: gradients for a subset of the tokens."""

    _argument_group_name = "selective backpropagation"
    tokentune: bool = flag(False, "backpropagate through selected tokens alone")
    prefix_length: str = flag(
        "100",
        "selected tokens per sequence: a number (16), or, with a decimal point, a proportion of its tokens (0.3); "
        "answers: all that predict a supervised one, answers+0.1: and a tenth of the others; from one to another over "
        "the run: 0.1:0.5; without --tokentune it does nothing. --selected_tokens is the same flag",
        metavar="NUMBER",
    )
    selection: str = flag(
        "supervised",
        f"how they are chosen: {in_words(UNSCORED)}; by scores of a first pass over all tokens: "
        f"{in_words(SCORED)}; or by a function of your own, file.py:function",
        metavar="NAME",
    )
    selection_pass: bool = flag(
        False,
        "a scoring pass first: a forward pass over all tokens without gradients, whose keys and values the selected "
        "tokens then attend to; the log gets the loss over all supervised tokens. Strategies with scores imply it",
    )
    selection_draw: Literal["proportional", "top"] = flag(
        "proportional",
        "what scores do: each token's probability is in proportion to its score, and its loss weighs 1 / probability "
        "(the mean over draws is the loss over all); or the tokens with the highest scores are taken",
    )
    selection_layers: int | None = flag(
        None,
        "scores from the first N layers alone, a cheaper pass; the selected tokens then run beside all others as ever",
        least=1,
    )
    selection_reference_model: str | None = flag(
        None, "the model whose loss excess_loss takes off: hub id or local folder, with the same tokenizer"
    )
    gradient_correction: float = flag(
        0.0,
        "draw each token independently (--selection random, or --prefix_length answers+0.1), and scale the gradients "
        "that reach selected tokens through other tokens' attention by 1 / probability to this power: 0 is the paper's "
        "method, 1 makes the gradient's expectation that of training on all tokens",
    )
    diagnose_steps: int | None = flag(
        None,
        "every N steps also take the gradient over all tokens, and log the selective one's cosine to it and their "
        "relative difference; such a step takes the time and memory of full training besides, training stays the same",
        least=1,
    )
    skip_verification: bool = flag(
        False, "do not compare a tiny copy of the model with the method's definition first: at your own risk"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parsed = parse_prefix_length(self.prefix_length)
        except ValueError as error:
            raise UserError(f"--prefix_length {self.prefix_length}: {error}") from None
        self.schedule = parsed if isinstance(parsed, Schedule) else None
        self.selected = parsed.largest if isinstance(parsed, Schedule) else parsed  # what there has to be room for
        steps = self.diagnose_steps
        require(
            steps is None or self.tokentune,
            f"--diagnose_steps {steps} compares the selective gradient with the full one: add --tokentune",
        )
        self._check_scores(machine.needs_of(self.selection))
        require(
            0 <= self.gradient_correction <= 1,  # NaN fails
            f"--gradient_correction {self.gradient_correction}: must be from 0 (none) to 1",
        )
        if self.takes_answers:
            self.check_answers()
        if self.gradient_correction > 0 and self.tokentune:
            reason = machine.why_not_independent(self.selection, self.schedule or self.selected)
            require(reason is None, f"--gradient_correction {self.gradient_correction:g}: {reason}")
        if not self.tokentune:
            names = [f.name for f in fields(self) if f.name not in ("tokentune", "diagnose_steps")]
            log_without_effect(self, names, "--tokentune")

    def check_answers(self) -> None:
        """What goes with a selection of all supervised tokens."""
        asked, name = f"--prefix_length {self.prefix_length}", self.selection
        require(
            not self.scored and name != "reference",
            f"{asked} with --selection {name}, which draws for a whole row: take one without scores, such as "
            "stratified, that can choose among the other tokens alone",
        )
        require(
            self.selected.share > 0 or name == self.__dataclass_fields__["selection"].default,
            f"{asked} with --selection {name}: it has nothing to choose; add a share of the other tokens, as in "
            "answers+0.1, or leave it out",
        )
        require(
            not self.selection_pass,
            f"{asked} with --selection_pass: every supervised token has its loss already; leave one of them out",
        )

    def _check_scores(self, needs: tuple[str, ...]) -> None:
        """What goes with a strategy's scores, or takes some."""
        require(
            "excess_loss" not in needs or self.selection_reference_model is not None,
            f"--selection {self.selection} takes the loss of a reference model off: add --selection_reference_model",
        )
        require(
            "excess_loss" in needs or self.selection_reference_model is None,
            "--selection_reference_model is for --selection excess_loss: leave it out, or take that one",
        )
        layers = self.selection_layers
        require(
            layers is None or bool(needs),
            f"--selection_layers {layers}: --selection {self.selection} has no scores; leave it out",
        )
        if self.tokentune and not needs:
            log_without_effect(self, ("selection_draw",), "a --selection with scores")

    @property
    def takes_answers(self) -> bool:
        """Whether all target positions are selected, so that the number of selected tokens depends on the rows."""
        return self.tokentune and isinstance(self.selected, Answers)

    @property
    def scoring_pass(self) -> bool:
        """Whether a pass over all tokens comes first, after which the model draws, and not the collator."""
        return self.tokentune and (self.selection_pass or self.scored)

    @property
    def scored(self) -> bool:
        """Whether the strategy needs scores, so that nothing can be drawn without the model."""
        return bool(machine.needs_of(self.selection))


@dataclass
class MemoryArguments(Group):
    """What is kept for the backward pass, and where."""

    _argument_group_name = "memory"
    gradient_checkpointing: bool = flag(
        False,
        "keep of each layer only what it takes to recompute it in the backward pass; with --tokentune the selected "
        "tokens alone are recomputed",
    )
    checkpoint_rest: Literal["auto", "keys_values", "hidden_states", "segments"] = flag(
        "auto",
        "what --gradient_checkpointing keeps of the tokens that are not selected: each layer's keys and values, or its "
        "input, auto: the smaller of the two; segments keeps least and computes their forward pass twice",
    )
    offload_kv: bool = flag(False, "keep that in the CPU's memory, copied beside the GPU's work")
    chunked_loss: Literal["auto", "on", "off"] = flag(
        "auto",
        "take the loss a chunk of rows at a time, so that the logits of a large vocabulary are never there as a whole; "
        "auto: with --tokentune, where it costs no time (adapters) or with --gradient_checkpointing",
    )
    report_memory: bool = flag(
        False, "after the run, say what its memory held and what would help most (also in memory_report.json)"
    )
    memory_snapshot: str | None = flag(
        None, "write the GPU allocator's history to this file, for pytorch.org/memory_viz; needs a GPU"
    )

    def __post_init__(self) -> None:
        require(
            self.memory_snapshot is None or machine.has_gpu(),
            "--memory_snapshot is a history of the GPU's allocator, and no GPU is there: leave it out "
            "(--report_memory works everywhere)",
        )
        if not self.gradient_checkpointing:
            log_without_effect(self, ("checkpoint_rest", "offload_kv"), "--gradient_checkpointing")
        elif self.offload_kv and not machine.has_gpu():
            logger.warning("--offload_kv changes nothing here: without a GPU everything is in the CPU's memory")


@dataclass
class AdapterArguments(Group):
    """LoRA and QLoRA."""

    _argument_group_name = "adapters"
    lora: bool = flag(False, "train low-rank adapters, freeze the base")
    qlora: bool = flag(False, "the same over a 4-bit base (NF4, double quantisation); implies --lora")
    lora_r: int = flag(8, "rank", least=1)
    lora_alpha: int = flag(16, "scale: the adapter's output is multiplied by alpha / rank")
    lora_dropout: float = flag(0.05, "dropout in front of the adapters")
    lora_target_modules: list[str] = flag(
        ["gate_proj", "down_proj", "up_proj"], "names of the linear layers that get adapters, or all-linear"
    )
    lora_on: Literal["all", "answers"] = flag(
        "all",
        "the tokens that adapters act on: all; or each answer with its generation prompt, behind a prompt that runs "
        "through the base alone (peft's activated LoRA): with --prefix_length answers the gradient is exact then",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora = self.lora or self.qlora
        require(
            not self.qlora or find_spec("bitsandbytes") is not None,
            "--qlora: the package is not installed; `pip install bitsandbytes`",
        )
        # The tokens in front of an answer: the data tells which, and until then one stands for them.
        self.invocation = (0,) if self.lora and self.lora_on == "answers" else None
        require(self.lora_alpha > 0, f"--lora_alpha {self.lora_alpha}: must be above 0, or the adapters do nothing")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        if not self.lora:
            flags = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_on")
            log_without_effect(self, flags, "--lora or --qlora")
