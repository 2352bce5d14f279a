"""Command: what a fine-tuning run needs in memory, before any weight is loaded or any GPU rented.

    python ./tokentune/estimate.py --model_name_or_path llama-3-8b --bf16 --prefix_length 0.3

Prints a table: full fine-tuning, gradient checkpointing, TokenTune and both, each with full weights, LoRA and QLoRA,
and the cards that each fits. The flags are those of `finetune.py`, all but the model optional, and the model is a
preset's name, a config.json, a folder or a hub id. Flags that choose a mode (`--lora --tokentune`) mark its row; with
`--only` it is the only one. `--find proportion` and `--find batch`, with `--memory 24` (GB), give the largest that
fits, `--find length` the longest sequence. No data set is needed. The real step runs, on tensors without data
(`memory/footprint.py`). `--num_processes 8 --sharding fsdp` tells what each of several GPUs holds and sends
(`memory/sharding.py`).
"""

import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("estimate")  # before the imports below, which take seconds

from tokentune.cli.arguments import flags_given, parse_arguments
from tokentune.cli.command import run_command
from tokentune.core.profile import Profile
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.memory.estimate_table import Request, Row, fits_card, in_gib, print_table, settings_of
from tokentune.memory.footprint import Footprint, measure, profile_of
from tokentune.memory.micro_batch import last_that_fits
from tokentune.memory.presets import load_subject
from tokentune.memory.sharding import measure_share
from tokentune.models.tasks import CAUSAL_LM
from tokentune.settings.estimate import EstimateArguments
from tokentune.settings.finetune import Arguments
from tokentune.training.checkpoints.saving import write_whole

METHODS = {  # (tokentune, gradient checkpointing)
    "full": (False, False),
    "gradient checkpointing": (False, True),
    "TokenTune": (True, False),
    "TokenTune + checkpointing": (True, True),
}
WEIGHTS = {"all weights": (False, False), "LoRA": (True, False), "QLoRA": (True, True)}  # (lora, qlora)
PROPORTIONS = tuple(step / 100 for step in range(5, 101, 5))
MOST_SEQUENCES = 4096
LENGTHS = range(128, 2**20 + 1, 128)  # tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    request = parse(argv)
    profile = profile_or_reason(request)
    report = {"settings": settings_of(request)}
    if request.find is not None:
        report["find"] = find(request, profile)
    else:
        rows = []
        for row in estimate(request, profile):
            print(f"{row.weights}, {row.method}: {row.seconds:.1f} s", file=sys.stderr)
            rows.append(row)
        print_table(rows, request)
        report["rows"] = [row.as_dict() for row in rows]
    if request.json is not None:
        write_whole(Path(request.json), json.dumps(report, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> Request:
    """The command's own flags, and `finetune.py`'s, of which only the model is needed."""
    logging.getLogger("tokentune").setLevel(logging.ERROR)  # of flags without effect in the mode that is marked
    given = flags_given(argv, EstimateArguments)
    arguments = parse_arguments(argv, EstimateArguments)
    own = arguments.estimation
    subject = load_subject(arguments.model.model_name_or_path, trust_remote_code=arguments.model.trust_remote_code)
    batch_given = {"global_batch_size", "gradient_accumulation_steps"} & given.keys()
    sequences, rest_of_batch = divmod(arguments.optimization.micro_batch_size, own.num_processes)
    if batch_given and (sequences == 0 or rest_of_batch):
        raise UserError(
            f"--global_batch_size {arguments.optimization.global_batch_size}: its micro-batches of "
            f"{arguments.optimization.micro_batch_size} cannot be shared by --num_processes {own.num_processes}"
        )
    sequences = sequences if batch_given else subject.sequences
    length = arguments.data.max_length if "max_length" in given else subject.length
    if subject.head is not CAUSAL_LM and "lora_target_modules" not in given:
        arguments.adapters.lora_target_modules = ["all-linear"]  # the default's names are those of decoders
    if "prefix_length" not in given:
        arguments.selection.prefix_length, arguments.selection.selected = "0.3", 0.3
    sharding = None if own.num_processes == 1 else own.sharding or "ddp"
    shape, shared = (sequences, length), (own.num_processes, sharding)
    return Request(arguments, subject, shape, own.device, own.only, own.find, own.memory, own.json, *shared)


# --- the numbers ------------------------------------------------------------------------------------------------------


def profile_or_reason(request: Request) -> Profile | str:
    """How TokenTune serves the model, or why it cannot."""
    if request.only and not request.arguments.selection.tokentune:
        return "not asked for"
    try:
        model = request.arguments.model
        return profile_of(
            request.subject.config,
            request.subject.head,
            model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        )
    except UnsupportedModelError as error:
        return f"TokenTune cannot serve this model exactly: {error}"


def estimate(request: Request, profile: Profile | str) -> Iterator[Row]:
    """The table's rows, one by one: the mode that the flags choose first."""
    arguments = request.arguments
    chosen_method = arguments.selection.tokentune, arguments.memory.gradient_checkpointing
    chosen_weights = arguments.adapters.lora, arguments.adapters.qlora
    modes = [
        ((method, weights), (chosen_method, chosen_weights) == (METHODS[method], WEIGHTS[weights]))
        for weights in WEIGHTS
        for method in METHODS
    ]
    for (method, weights), chosen in modes:
        if chosen or not request.only:
            yield _row(request, method, weights, chosen, profile)


def _row(request: Request, method: str, weights: str, chosen: bool, profile: Profile | str) -> Row:
    started = time.perf_counter()
    footprint, reason = None, None
    try:
        footprint = footprint_of(request, with_mode(request.arguments, method, weights), request.shape, profile)
    except (UserError, UnsupportedModelError) as error:
        reason = str(error)
    return Row(method, weights, chosen, footprint, reason, time.perf_counter() - started)


def footprint_of(request: Request, arguments: Arguments, shape: tuple[int, int], profile: Profile | str) -> Footprint:
    """`measure`, for the request's model.

    Raises:
        UserError: what cannot be run, with the reason.
    """
    if arguments.selection.tokentune and isinstance(profile, str):
        raise UserError(profile)
    subject = request.subject
    options = {"device": request.device, "head": subject.head}
    options["profile"] = None if isinstance(profile, str) else profile
    if request.sharding is not None:
        options |= {"processes": request.processes, "sharding": request.sharding}
    try:
        return (measure if request.sharding is None else measure_share)(subject.config, arguments, shape, **options)
    # Code that reads what fake tensors do not have, or asks a GPU that is not there (torch without CUDA: an assertion).
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot be run without data: {type(error).__name__}: {lines[0]}") from error


def with_mode(arguments: Arguments, method: str, weights: str) -> Arguments:
    """The same flags, but for those that choose the table's row."""
    changed = copy.deepcopy(arguments)
    changed.selection.tokentune, changed.memory.gradient_checkpointing = METHODS[method]
    changed.adapters.lora, changed.adapters.qlora = WEIGHTS[weights]
    return changed


# --- the largest that fits --------------------------------------------------------------------------------------------


def find(request: Request, profile: Profile | str) -> dict[str, Any]:
    """The largest proportion of selected tokens, or micro-batch, that fits the card, in the mode that the flags choose.

    Raises:
        UserError: not even the smallest fits, or a mode that this cannot be asked of.
    """
    rows, length = request.shape
    if request.find == "proportion" and not request.arguments.selection.tokentune:
        raise UserError("--find proportion is about selected tokens: add --tokentune")
    steps, unit = {
        "proportion": (PROPORTIONS, "--prefix_length"),
        "length": (LENGTHS, "tokens"),
        "batch": (range(1, MOST_SEQUENCES + 1), "sequences"),
    }[request.find]

    def run(value: float) -> Footprint:
        changed = copy.deepcopy(request.arguments)
        if request.find == "proportion":
            changed.selection.selected, changed.selection.prefix_length = value, str(value)
        shape = {"length": (rows, value), "batch": (value, length)}.get(request.find, request.shape)
        return footprint_of(request, changed, shape, profile)

    best, footprint, tried = largest(steps, run, request.memory_gb)
    if best is None:
        raise UserError(
            f"--memory {request.memory_gb:g}: not even {unit} {steps[0]} fits, whose peak is "
            f"{in_gib(footprint.peak)} GiB. Try --gradient_checkpointing, --lora, --qlora, or a shorter --max_length."
        )
    name = {
        "proportion": f"--prefix_length {best}",
        "batch": f"{best} sequences of {length} tokens",
        "length": f"{rows} x {best} tokens",
    }[request.find]
    positions = getattr(request.subject.config.get_text_config(), "max_position_embeddings", None)
    if request.find == "length" and positions is not None and best > positions:
        print(f"the model was made for at most {positions} positions")
    bound = " (the most that was tried)" if best == steps[-1] else ""
    print(f"largest {request.find} for {request.memory_gb:g} GB: {name}{bound}, peak {in_gib(footprint.peak)} GiB")
    return {request.find: best, "memory_gb": request.memory_gb, "bytes": footprint.as_dict(), "steps_run": tried}


def largest(
    values: Sequence[Any], run: Callable[[Any], Footprint], memory_gb: float
) -> tuple[Any | None, Footprint, int]:
    """The last of ascending `values` whose step fits (None: not even the first), its footprint, and the steps run."""
    seen: dict[Any, Footprint] = {}

    def whether_fits(value: Any) -> bool:
        seen[value] = run(value)
        return fits_card(seen[value].peak, memory_gb)

    best = last_that_fits(values, whether_fits)
    return best, seen[values[0] if best is None else best], len(seen)


if __name__ == "__main__":
    run_command(main)
