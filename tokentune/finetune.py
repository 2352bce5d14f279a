"""Command: fine-tune a causal language model, with gradients for selected tokens, adapters, both or neither.

    python -u ./tokentune/finetune.py \
        --model_name_or_path meta-llama/Llama-3.2-1B \
        --dataset_name_or_path garage-bAInd/Open-Platypus \
        --global_batch_size 32 --gradient_accumulation_steps 32 \
        --warmup_steps 100 --learning_rate 4e-4 --bf16 \
        --lora --tokentune --prefix_length 0.3

The model, or with adapters the adapter alone, lands in `./models/<model>-<data>-lora-tokentune-0.3/`, with the
tokenizer, `training_summary.json` and `training_curves.png`. `--help` lists every flag. Bad input ends with one
sentence and exit code 2, before any weight is read and before anything is written.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Other packages' words on their own internals, which a user can do nothing about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from tokentune.arguments import Arguments, parse_arguments
from tokentune.collators import SeededRows
from tokentune.errors import log_to_stderr, run_command
from tokentune.loading import load_config, load_tokenizer, run_folder_name
from tokentune.memory_report import memory_watched
from tokentune.preparation import base_dtype, check_structure, prepare_model, saved_as, unsupported_models_refused
from tokentune.prompts import EncodingReport, PromptTemplate, encode_records, ensure_pad_token
from tokentune.records import load_records, require_columns
from tokentune.run_folder import check_run_folder, clear_run_folder
from tokentune.summary import build_summary, draw_curves, write_summary
from tokentune.training import build_trainer, build_training_arguments, save_result

logger = logging.getLogger("tokentune")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    started = time.perf_counter()
    log_to_stderr()
    arguments = parse_arguments(argv)
    run_folder = run_folder_of(arguments)
    if arguments.output.print_run_folder:
        print(run_folder)
        return

    # Whatever can be refused is refused here: nothing has been written, no weight read.
    check_run_folder(run_folder, overwrite=arguments.output.overwrite_output_dir)
    settings = build_training_arguments(arguments, run_folder)
    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    config = load_config(arguments.model.model_name_or_path)
    dtype = base_dtype(arguments, config)
    tokenizer = load_tokenizer(arguments.model.model_name_or_path)
    ensure_pad_token(tokenizer, config.get_text_config().vocab_size)
    check_structure(arguments, config)
    train_rows, train_report = encode(arguments, template, tokenizer, split="train")
    eval_rows, eval_report = encode(arguments, template, tokenizer, split="validation")

    set_seed(arguments.optimization.seed)
    with memory_watched(arguments, config):
        model = prepare_model(arguments, dtype)
    if settings.process_index == 0:
        clear_run_folder(run_folder)
    rows = SeededRows(train_rows, arguments.optimization.seed)
    trainer = build_trainer(model, settings, rows, eval_rows, tokenizer, arguments)
    with unsupported_models_refused(), memory_watched(arguments, config, trainer):
        trainer.train()

    saved_dtype = saved_as(arguments, config, dtype)
    facts = save_result(trainer, run_folder, saved_dtype) | {"base_dtype": str(dtype).removeprefix("torch.")}
    if trainer.is_world_process_zero():
        reports = {"train": train_report, "validation": eval_report}
        summary = build_summary(trainer, arguments, reports, facts, time.perf_counter() - started)
        write_summary(summary, run_folder)
        draw_curves(summary, run_folder)
        logger.info("saved in %s", run_folder)


def run_folder_of(arguments: Arguments) -> Path:
    """`<model_save_path>/<model>-<data>[-lora][-qlora][-tokentune-<selected>]`."""
    name = run_folder_name(
        arguments.model.model_name_or_path,
        arguments.data.dataset_name_or_path,
        lora=arguments.adapters.lora,
        qlora=arguments.adapters.qlora,
        tokentune=arguments.selection.tokentune,
        prefix_length=arguments.selection.selected,
    )
    return Path(arguments.output.model_save_path).expanduser() / name


def encode(
    arguments: Arguments, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, split: str
) -> tuple[Dataset | None, EncodingReport | None]:
    """The training or validation data as rows of token ids and labels, and what was cut and dropped.

    Returns (None, None) where no validation data is given. `split` chooses within a hub data set or a folder.
    """
    data = arguments.data
    flag = "--dataset_name_or_path" if split == "train" else "--eval_dataset_name_or_path"
    names = data.dataset_name_or_path if split == "train" else [data.eval_dataset_name_or_path]
    if names == [None]:
        return None, None
    (name,) = names
    records = load_records(name, flag=flag, split=split)
    require_columns(records, ["instruction", "output"], f"{flag} {name}")
    rows, report = encode_records(
        records, tokenizer, template, max_length=data.max_length, add_eos_token=data.add_eos_token
    )
    logger.info("%s %s: %s", flag, name, report)
    return rows, report


if __name__ == "__main__":
    run_command(main)
