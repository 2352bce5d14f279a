"""Flags, folders and configuration files that cannot work: the sentence that each ends with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import check_sentence, filled, refusal

from tokentune import finetune

NO_LENGTH = (
    "is neither a number of tokens (16, at least 1) nor a proportion of the sequence (0.3, above 0.0 and at most 1.0), "
    "nor answers or answers+0.1"
)
NO_EVALUATION = "looks at the validation loss: add --eval_steps, and --eval_dataset_name_or_path or --eval_fraction"
LEAST = {  # of each flag
    **dict.fromkeys(("--num_epochs", "--global_batch_size", "--max_steps", "--logging_steps", "--preview"), 1),
    "--max_length": 2,
    **dict.fromkeys(("--warmup_steps", "--seed", "--num_workers"), 0),
}
FLAGS = [
    *((f"{flag} too small", f"{flag} {n - 1}", f"{flag} {n - 1}: must be {n} or more") for flag, n in LEAST.items()),
    ("a typo", "--learnin_rate 1e-3", "unknown argument --learnin_rate: did you mean --learning_rate?"),
    (
        "a typo with dashes",
        "--gradient-acumulation-steps 2",
        "unknown argument --gradient-acumulation-steps: did you mean --gradient_accumulation_steps?",
    ),
    ("a flag of nobody", "--zzz 1", "unknown argument --zzz (--help all lists all flags)"),
    (
        "a word without a flag",
        "--lora true stray",
        "unexpected argument 'stray', which belongs to no flag (--help all lists all flags)",
    ),
    (
        "a config without its flag",
        "--lora true run.yaml",
        "unexpected argument 'run.yaml', which belongs to no flag: did you mean --config run.yaml?",
    ),
    (
        "a flag without its value",
        "--num_epochs",
        "argument --num_epochs: expected one argument (--help all lists all flags)",
    ),
    ("no number", "--num_epochs many", "argument --num_epochs: invalid int value: 'many'..."),
    (
        "a fraction for a count",
        "--global_batch_size 4.5",
        "argument --global_batch_size: invalid int value: '4.5'...",
    ),
    ("no fraction", "--learning_rate fast", "argument --learning_rate: invalid float value: 'fast'..."),
    ("no boolean", "--bf16 maybe", "argument --bf16: 'maybe' is not true or false (--help all lists all flags)"),
    (
        "no such dtype",
        "--base_dtype int8",
        "argument --base_dtype: invalid choice: 'int8' (choose from ...",
    ),
    (
        "no such selection",
        "--selection best",
        "--selection best: there is no such strategy. Known are random, reference,...",
    ),
    (
        "no such data format",
        "--data_format xml",
        "argument --data_format: invalid choice: 'xml' (choose from ...",
    ),
    ("a learning rate of nothing", "--learning_rate 0", "--learning_rate 0: nothing would be learnt"),
    ("a learning rate of nan", "--learning_rate nan", "--learning_rate nan: must be 0 or more"),
    (
        "a batch that does not divide",
        "--global_batch_size 32 --gradient_accumulation_steps 5",
        "--gradient_accumulation_steps 5 x 1 process(es) does not divide --global_batch_size 32: "
        "micro-batches must be of one size",
    ),
    (
        "no such schedule",
        "--lr_scheduler_type stairs",
        "--lr_scheduler_type stairs: choose from cosine, linear, constant, constant_with_warmup, "
        "cosine_with_restarts, polynomial, inverse_sqrt",
    ),
    (
        "no such optimizer",
        "--optim adam_magic",
        "--optim adam_magic: the Trainer has no such optimizer; it has adamw_torch,...",
    ),
    (
        "no selected tokens",
        "--tokentune --prefix_length 0",
        f"--prefix_length 0: '0' {NO_LENGTH}",
    ),
    (
        "more than all tokens",
        "--tokentune --prefix_length 1.5",
        f"--prefix_length 1.5: '1.5' {NO_LENGTH}",
    ),
    (
        "a word for tokens",
        "--tokentune --prefix_length some",
        f"--prefix_length some: 'some' {NO_LENGTH}",
    ),
    (
        "answers that a strategy would choose",
        "--tokentune --prefix_length answers --selection random",
        "--prefix_length answers with --selection random: it has nothing to choose; add a share of the other...",
    ),
    (
        "answers by scores",
        "--tokentune --prefix_length answers+0.1 --selection loss",
        "--prefix_length answers+0.1 with --selection loss, which draws for a whole row: take one without scores...",
    ),
    (
        "answers as the released code drew",
        "--tokentune --prefix_length answers+0.1 --selection reference",
        "--prefix_length answers+0.1 with --selection reference, which draws for a whole row: take one without...",
    ),
    (
        "answers after a scoring pass",
        "--tokentune --prefix_length answers --selection_pass",
        "--prefix_length answers with --selection_pass: every supervised token has its loss already; leave one of...",
    ),
    (
        "a correction of dependent draws",
        "--tokentune --prefix_length 0.3 --selection stratified --gradient_correction 0.5",
        "--gradient_correction 0.5: stratified does not draw each token independently of the others: take random...",
    ),
    ("two precisions", "--bf16 --fp16", "--bf16 and --fp16 exclude each other: give one of them"),
    ("rank nothing", "--lora --lora_r 0", "--lora_r 0: must be 1 or more"),
    ("all dropout", "--lora --lora_dropout 1", "--lora_dropout 1.0: must be at least 0 and below 1"),
    ("scale nothing", "--lora --lora_alpha 0", "--lora_alpha 0: must be above 0, or the adapters do nothing"),
    ("no such tracker", "--report_to diary", "--report_to diary: choose none, or from ..."),
    ("none and another", "--report_to none tensorboard", "--report_to none tensorboard: none, or the others"),
    (
        "evaluating on nothing",
        "--eval_steps 10",
        "--eval_steps needs data to evaluate on: add --eval_dataset_name_or_path or --eval_fraction",
    ),
    ("evaluating never", "--eval_steps 0 --eval_fraction 0.5", "--eval_steps 0: must be 1 or more"),
    (
        "patience without evaluation",
        "--early_stopping_patience 3",
        f"--early_stopping_patience {NO_EVALUATION}",
    ),
    (
        "no patience",
        "--early_stopping_patience 0 --eval_steps 1 --eval_fraction 0.5",
        "--early_stopping_patience 0: must be 1 or more",
    ),
    (
        "best of nothing",
        "--load_best_model_at_end",
        f"--load_best_model_at_end {NO_EVALUATION}",
    ),
    ("a stream without an end", "--streaming", "--streaming cannot know how many rows there are: add --max_steps"),
    ("all for validation", "--eval_fraction 1", "--eval_fraction 1.0: give a share between 0 and 1, such as 0.05"),
    ("nothing for validation", "--eval_fraction 0", "--eval_fraction 0.0: give a share between 0 and 1, such as 0.05"),
    (
        "two ways to validate",
        "--eval_fraction 0.5 --eval_dataset_name_or_path {data}",
        "--eval_fraction 0.5 and --eval_dataset_name_or_path both say what to evaluate on: give one of them",
    ),
    (
        "a stream to be split",
        "--streaming --max_steps 2 --eval_fraction 0.5",
        "--streaming with --eval_fraction: the validation rows would be complete only once all data was "
        "read. Put them into a file of their own: --eval_dataset_name_or_path",
    ),
    (
        "a stream to be packed",
        "--streaming --max_steps 2 --packing",
        "--streaming with --packing: which documents fill a row is chosen by all their lengths, which a "
        "stream does not know beforehand. Leave one of them out",
    ),
    (
        "weights for other data",
        "--dataset_weights 1 2",
        "--dataset_weights 1.0 2.0: 2 weights for 1 data sets; give one each",
    ),
    ("a negative weight", "--dataset_weights -1", "--dataset_weights -1.0: must be 0 or more"),
    (
        "gradients added up that are gone",
        "--optim_in_backward --gradient_accumulation_steps 2",
        "--optim_in_backward applies each gradient at once and cannot add up --gradient_accumulation_steps 2 "
        "micro-batches: take 1, with a smaller --global_batch_size",
    ),
    (
        "clipping what is gone",
        "--optim_in_backward",
        "--optim_in_backward cannot clip gradients by their common norm, which it never sees: add --max_grad_norm 0",
    ),
    (
        "optimizers of whole matrices",
        "--lora --optim galore_adamw",
        "--optim galore_adamw projects gradients of whole weight matrices to a low rank, which those of "
        "adapters have already: leave --lora and --qlora out, or take another --optim",
    ),
    ("no model", "--model_name_or_path=", "--model_name_or_path is empty: give a hub id or a local folder"),
    ("no folder for the result", "--model_save_path=", "--model_save_path is empty: give a folder"),
    (
        "a control character",
        "--model_save_path=a\x1b[2J",
        "the command line: '--model_save_path=a\\x1b[2J' holds a control character.",
    ),
    (
        "no such config",
        "--config {tmp}/none.yaml",
        "--config {tmp}/none.yaml: cannot be read: No such file or directory.",
    ),
    ("two configs", "--config a.yaml --config b.yaml", "--config is given 2 times: put the flags into one file"),
    (
        "no such checkpoint",
        "--resume_from_checkpoint {tmp}/none",
        "--resume_from_checkpoint {tmp}/none: there is no such checkpoint; give last, or a folder checkpoint-<step>",
    ),
    (
        "a checkpoint that is none",
        "--resume_from_checkpoint {model}",
        "--resume_from_checkpoint {model}: there is no such checkpoint; give last, or a folder checkpoint-<step>",
    ),
    (
        "resuming and replacing",
        "--resume_from_checkpoint last --overwrite_output_dir",
        "--overwrite_output_dir would delete what --resume_from_checkpoint goes on from: leave one of them out",
    ),
    (
        "half of full training",
        "--base_dtype float16",
        "--base_dtype float16: weights that are trained cannot be held in float16 (their updates vanish or "
        "turn to NaN). Leave --base_dtype out; --fp16 alone computes in float16 over float32 weights.",
    ),
    (
        "an upload without a name",
        "--push_to_hub not/a/name",
        "--push_to_hub not/a/name: no name of a repository (owner/name): ...",
    ),
]


@pytest.mark.parametrize(("name", "words", "sentence"), FLAGS, ids=[name for name, *_ in FLAGS])
def test_flags(
    name: str, words: str, sentence: str, refused: Callable, tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    places = {"tmp": tmp_path, "model": tiny_llama_dir, "data": alpaca_file}
    check_sentence(refused(*filled(words, **places).split(" ")), sentence, **places)


def test_flags_that_are_missing(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert refusal(finetune.main, {}, [], tmp_path, capsys) == (
        "the following arguments are required: --model_name_or_path, --dataset_name_or_path (--help all lists all "
        "flags)"
    )


@pytest.mark.parametrize(
    ("flag", "near"), [("--model_name_or_paht", "--model_name_or_path"), ("--model-name-or", "--model_name_or_path")]
)
def test_a_needed_flag_that_is_misspelt(flag: str, near: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Not that the right one is missing."""
    message = refusal(finetune.main, {}, [flag, "m", "--dataset_name_or_path", "d"], tmp_path, capsys)
    assert message == f"unknown argument {flag}: did you mean {near}?"


def test_a_finished_run_is_not_overwritten(refused: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny-llama-tiny_alpaca"
    folder.mkdir(parents=True)
    (folder / "training_summary.json").write_text("{}", encoding="utf-8")
    assert refused().startswith(f"{folder} already holds a finished run.\n")
    assert refused("--resume_from_checkpoint", "last") == (
        f"{folder}/training_summary.json: not the summary of a run, so whether it is complete cannot be told.\n"
        "Delete the file to go on from the last checkpoint, or give --overwrite_output_dir."
    )


def test_output_folder_below_a_file(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    assert refused("--model_save_path", f"{tmp_path}/file/models") == (
        f"the output folder {tmp_path}/file/models/tiny-llama-tiny_alpaca cannot be written: Not a directory "
        f"({tmp_path}/file).\nGive another --model_save_path."
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that not even root can write to: /proc, of Linux")
def test_output_folder_that_is_not_writable(refused: Callable) -> None:
    message = refused("--model_save_path", "/proc/models")
    assert message.startswith("the output folder /proc/models/tiny-llama-tiny_alpaca cannot be written: ")
    assert message.endswith(" (/proc).\nGive another --model_save_path.")
