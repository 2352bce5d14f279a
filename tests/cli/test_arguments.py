"""The command line: the released names and defaults, what follows from flags, what is refused."""

import io
import logging
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers.integrations import integration_utils
from transformers.training_args import OptimizerNames

import tokentune
from tokentune.cli.arguments import parse_arguments, parser_of
from tokentune.cli.start import COMMANDS
from tokentune.errors import UserError
from tokentune.sampling import strategies
from tokentune.sampling.meanings import NEEDS
from tokentune.sampling.strategies import REGISTRY
from tokentune.settings import machine
from tokentune.settings.finetune import FinetuneArguments

REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data"]
# The released interface, and what this project adds to it.
DEFAULTS = {
    "tokentune": False,
    "prefix_length": "100",
    "lora": False,
    "qlora": False,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_modules": ["gate_proj", "down_proj", "up_proj"],
    "lora_on": "all",
    "bf16": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "global_batch_size": 128,
    "gradient_accumulation_steps": "auto",
    "num_epochs": 1,
    "num_workers": 0,
    "learning_rate": 1.5e-4,
    "weight_decay": 0.01,
    "warmup_steps": "auto",
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "add_eos_token": False,
    "save_steps": 50000,
    "save_total_limit": 10,
    "logging_steps": "auto",
    "logging_dir": None,
    "model_parallel": False,
    "offline": False,
    "trust_remote_code": False,
    "allow_pickle": False,
    "attn_implementation": None,
    "chunked_loss": "auto",
    "use_liger_kernel": False,
    "gradient_checkpointing": False,
    "checkpoint_rest": "auto",
    "offload_kv": False,
    "report_memory": False,
    "memory_snapshot": None,
    "model_save_path": "./models/",
    "run_name": None,
    "base_dtype": "auto",
    "eval_dataset_name_or_path": None,
    "eval_steps": None,
    "dataset_split": [],
    "dataset_config": [],
    "eval_dataset_split": None,
    "eval_dataset_config": None,
    "bad_rows": "stop",
    "group_by_length": False,
    "system_in_user": False,
    "tokenize_workers": None,
    "selection": "supervised",
    "selection_pass": False,
    "selection_draw": "proportional",
    "selection_layers": None,
    "selection_reference_model": None,
    "gradient_correction": 0.0,
    "diagnose_steps": None,
    "skip_verification": False,
    "seed": 42,
    "optim": "adamw_torch",
    "optim_args": None,
    "optim_in_backward": False,
    "max_grad_norm": 1.0,
    "report_to": ["tensorboard"],
    "overwrite_output_dir": False,
    "print_run_folder": False,
    "dataset_weights": [],
    "data_format": "auto",
    "chat_template": None,
    "long_rows": "cut",
    "packing": False,
    "eval_fraction": None,
    "streaming": False,
    "data_cache": "auto",
    "max_steps": None,
    "preview": None,
    "dry_run": False,
    "resume_from_checkpoint": None,
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
    "auto_micro_batch": False,
    "skip_memory_probe": False,
    "push_to_hub": None,
    "hub_public": False,
}


def test_defaults_are_the_released_ones() -> None:
    settings = parse_arguments(REQUIRED).settings()
    template = settings.pop("prompt_template_name_or_path")
    assert template.endswith("tokentune/alpaca_template.json")
    names = {"model_name_or_path": "owner/model", "dataset_name_or_path": ["owner/data"]}
    assert settings == DEFAULTS | names


def test_released_command_line_is_understood() -> None:
    words = "--prompt_template_name_or_path ./t.json --global_batch_size 32 --gradient_accumulation_steps 32 "
    words += "--num_workers 4 --learning_rate 4e-4 --warmup_steps 100 --lr_scheduler_type cosine --save_steps 1000 "
    words += "--model_save_path ./models/ --max_length 2048 --tokentune --lora --qlora --prefix_length 0.3 "
    words += "--lora_target_modules q_proj v_proj"
    arguments = parse_arguments([*REQUIRED, *words.split()])
    assert arguments.optimization.micro_batch_size == 1
    assert arguments.selection.tokentune and arguments.selection.selected == 0.3
    assert arguments.adapters.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(("text", "selected"), [("16", 16), ("0.3", 0.3), ("1.0", 1.0), ("100", 100)])
def test_prefix_length_tells_counts_from_proportions(text: str, selected: int | float) -> None:
    value = parse_arguments([*REQUIRED, "--tokentune", "--prefix_length", text]).selection.selected
    assert value == selected and type(value) is type(selected)


def test_a_schedule_s_largest_size_is_what_there_has_to_be_room_for() -> None:
    selection = parse_arguments([*REQUIRED, "--tokentune", "--prefix_length", "0.5:0.1"]).selection
    assert selection.selected == selection.schedule.largest == 0.5
    assert parse_arguments([*REQUIRED, "--tokentune", "--prefix_length", "0.5"]).selection.schedule is None


def test_a_strategy_of_ones_own_is_found(tmp_path: Path) -> None:
    file = tmp_path / "rare.py"
    file.write_text(
        "from tokentune.sampling.strategies import Tokens, strategy\n\n"
        "@strategy('rare_in_arguments')\n"
        "def rare(tokens: Tokens):\n"
        "    return tokens.input_ids + tokens.uniform\n"
    )
    selection = parse_arguments([*REQUIRED, "--tokentune", "--selection", f"{file}:rare"]).selection
    assert not selection.scoring_pass and not selection.scored
    file.write_text("def rare(tokens):\n    return tokens.uniform[0]\n")
    (tmp_path / "worse.py").write_text(file.read_text())
    with pytest.raises(UserError, match=r"^--selection /.*worse.py:rare: must return priorities of its tokens"):
        parse_arguments([*REQUIRED, "--selection", f"{tmp_path / 'worse.py'}:rare"])


@pytest.mark.parametrize(
    ("words", "scoring_pass"),
    [
        ("", False),
        ("--tokentune", False),
        ("--tokentune --selection_pass", True),
        ("--tokentune --selection loss", True),
        ("--selection loss", False),
    ],
)
def test_what_a_scoring_pass_comes_before(words: str, scoring_pass: bool) -> None:
    assert parse_arguments([*REQUIRED, *words.split()]).selection.scoring_pass is scoring_pass


@pytest.mark.parametrize(
    ("words", "value"),
    [("auto", "auto"), ("100", 100), ("0.03", 0.03), ("0", 0), ("1e3", 1000), ("100.0", 100)],
)
def test_warmup_is_a_number_a_share_or_auto(words: str, value: float | str) -> None:
    optimization = parse_arguments([*REQUIRED, "--warmup_steps", words]).optimization
    assert optimization.warmup_steps == value
    assert optimization.accumulation == 1 and optimization.micro_batch_size == 128  # until it is found


def test_a_search_for_the_micro_batch_is_what_auto_means() -> None:
    """Also in the run.yaml of a version whose default was 1."""
    words = [*REQUIRED, "--auto_micro_batch", "--gradient_accumulation_steps", "1"]
    assert parse_arguments(words).optimization.gradient_accumulation_steps == "auto"


def test_qlora_implies_adapters() -> None:
    assert parse_arguments([*REQUIRED, "--qlora"]).adapters.lora


def test_micro_batch_shares_the_global_batch_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*REQUIRED, "--global_batch_size", "24", "--gradient_accumulation_steps", "3"]
    assert parse_arguments(words).optimization.micro_batch_size == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_arguments(words).optimization.micro_batch_size == 2
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="does not divide"):
        parse_arguments(words)


REFUSED = [
    ("--bf16 --fp16", "--bf16 and --fp16 exclude each other"),
    ("--prefix_length 0", "--prefix_length 0"),
    ("--prefix_length -1", "--prefix_length -1"),
    ("--prefix_length abc", "--prefix_length abc"),
    ("--prefix_length 1.5", "--prefix_length 1.5"),
    ("--global_batch_size 10 --gradient_accumulation_steps 4", "does not divide --global_batch_size 10"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0"),
    ("--num_epochs 0", "--num_epochs 0"),
    ("--learning_rate 0", "--learning_rate 0"),
    ("--learning_rate nan", "--learning_rate nan"),
    ("--warmup_steps -5", "--warmup_steps -5"),
    ("--warmup_steps 1.5", "--warmup_steps 1.5: give a number of steps, a share of all steps below 1, or auto"),
    ("--warmup_steps nan", "--warmup_steps nan"),
    ("--warmup_steps few", "'few' is neither auto nor a number"),
    ("--logging_steps 2.5", "'2.5' is neither auto nor a whole number"),
    *(
        (f"--run_name {name}", f"--run_name {name!r}: not a folder's name on every system")
        for name in ("a/b", "a\\b", "..", ".hidden", "_x", "ends.", "caf\u00e9", "con:1", "x" * 101)
    ),
    ("--run_name=", "--run_name '': not a folder's name"),
    ("--lr_scheduler_type stairs", "--lr_scheduler_type stairs: choose from cosine"),
    ("--optim adam_magic", "--optim adam_magic"),
    ("--report_to diary", "--report_to diary"),
    ("--lora --lora_r 0", "--lora_r 0"),
    ("--lora --lora_dropout 1", "--lora_dropout 1"),
    ("--max_length 1", "--max_length 1"),
    ("--num_workers -1", "--num_workers -1"),
    ("--logging_steps 0", "--logging_steps 0"),
    ("--eval_steps 10", "add --eval_dataset_name_or_path"),
    ("--eval_dataset_split dev", "--eval_dataset_split chooses from validation data: add --eval_dataset_name_or_path"),
    ("--dataset_config a b", "--dataset_config a b: 2 names for 1 data sets; give one for all, or one each"),
    ("--eval_dataset_config=", "--eval_dataset_config is empty"),
    ("--base_dtype int8", "--base_dtype"),
    ("--selection best", "--selection best: there is no such strategy."),
    ("--selection gradeint", "Did you mean gradient?"),
    ("--selection nowhere.py:best", "--selection nowhere.py:best: there is no Python file nowhere.py"),
    ("--prefix_length 0.1:16", "--prefix_length 0.1:16: a schedule goes from one proportion to another"),
    ("--selection excess_loss", "add --selection_reference_model"),
    ("--selection loss --selection_reference_model owner/other", "is for --selection excess_loss"),
    ("--selection_layers 2", "--selection_layers 2: --selection supervised has no scores"),
    ("--selection loss --selection_layers 0", "--selection_layers 0: must be 1 or more"),
    ("--gradient_correction 1.5", "--gradient_correction 1.5: must be from 0 (none) to 1"),
    ("--gradient_correction nan", "--gradient_correction nan: must be"),
    ("--tokentune --diagnose_steps 0", "--diagnose_steps 0: must be 1 or more"),
    ("--tokentune --packing --selection loss", "--packing with --selection loss: the model draws then"),
    ("--tokentune --packing --prefix_length 0.1:0.5", "--packing with --prefix_length 0.1:0.5"),
    ("--tokentune --gradient_correction 1", "--gradient_correction 1: supervised selects what has a loss first"),
    ("--tokentune --gradient_correction 1 --selection loss", "loss does not draw each token independently"),
    (
        "--tokentune --gradient_correction 1 --prefix_length answers+0.3:answers",
        "--gradient_correction 1: answers alone draws nothing by chance",
    ),
    ("--prefix_lenght 0.3", "did you mean --prefix_length"),
    ("--lora_r eight", "--lora_r"),
    ("--bf16 --fp16_opt_level", "--fp16_opt_level"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments([*REQUIRED, *words.split()])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_missing_flags_are_named() -> None:
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse_arguments([])


def test_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="--fp16 needs a GPU"):
        parse_arguments([*REQUIRED, "--fp16"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match="cannot compute in bfloat16"):
        parse_arguments([*REQUIRED, "--bf16"])


WITHOUT_EFFECT = [
    ("--prefix_length 0.3", "--prefix_length has no effect without --tokentune"),
    ("--selection reference", "--selection has no effect without --tokentune"),
    ("--selection_pass", "--selection_pass has no effect without --tokentune"),
    ("--gradient_correction 0.5", "--gradient_correction has no effect without --tokentune"),
    ("--tokentune --selection_draw top", "--selection_draw has no effect without a --selection with scores"),
    ("--lora_r 4", "--lora_r has no effect without --lora or --qlora"),
    ("--fp16_opt_level O2", "--fp16_opt_level O2 does nothing"),
    ("--report_to none --logging_dir logs", "--logging_dir has no effect"),
]


@pytest.mark.parametrize(("words", "message"), WITHOUT_EFFECT, ids=[words for words, _ in WITHOUT_EFFECT])
def test_flags_without_effect_say_so(words: str, message: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        parse_arguments(REQUIRED)
        assert caplog.text == ""
        parse_arguments([*REQUIRED, *words.split()])
    assert message in caplog.text


@pytest.mark.parametrize(("gpus", "warned"), [(0, True), (1, True), (2, False)])
def test_model_parallel_says_when_it_changes_nothing(
    gpus: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    parse_arguments([*REQUIRED, "--model_parallel"])
    assert ("changes nothing" in caplog.text) is warned


def help_of(command: type, *words: str) -> str:
    """What a command's `--help` prints."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as ended, redirect_stdout(printed):
        parse_arguments(["--help", *words], command)
    assert ended.value.code == 0
    return printed.getvalue()


def listed(text: str) -> list[str]:
    """The flags that a help lists."""
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_help_all_lists_every_flag() -> None:
    text = help_of(FinetuneArguments, "all")
    assert {*DEFAULTS, "model_name_or_path", "help", "version", "config"} <= set(listed(text))
    assert "obsolete" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_what_most_runs_need_and_where_the_rest_is(name: str) -> None:
    command = COMMANDS[name]
    short, everything = (listed(help_of(command, *words)) for words in ((), ("all",)))
    assert len(short) <= 38 and set(short) <= set(everything)
    assert set(everything) == {*parser_of(command).flags, "help", "version", "config"}
    text = help_of(command)
    if len(everything) > 38:
        assert text.endswith(f"\n--help all lists all {len(everything)} flags.\n") and len(short) >= 12
    else:
        assert short == everything and "lists all" not in text
    usage = text.splitlines()[0].split()
    assert usage[:2] == ["usage:", command.prog] and usage[-1] == "[flags]"
    assert {action.metavar for action in parser_of(command).needed} <= set(usage[2:-1]) != set()
    groups = re.split(r"^(?=[a-z ]+:$)", text, flags=re.MULTILINE)[1:]
    assert groups and all(listed(group) for group in groups)


def test_help_of_one_word_too_many() -> None:
    with pytest.raises(UserError, match="invalid choice: 'lora'"):
        parse_arguments(["--help", "lora"])


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_readable(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(FinetuneArguments, "all")
    assert max(map(len, text.splitlines())) <= columns
    assert text.startswith("usage: finetune.py --model_name_or_path NAME --dataset_name_or_path NAME [flags]\n")
    flat = " ".join(text.split())
    assert "--lora_r N rank (default: 8) --lora_alpha N" in flat  # one spelling, and the default
    assert "--num_workers N data-loader worker processes (default: 0)" in flat  # 0 is a default worth saying
    assert "(default: alpaca_template.json)" in flat and "(default: ./models/)" in flat
    assert "--checkpoint_rest {auto,keys_values,hidden_states,segments}" in flat
    assert "--lora_target_modules NAME ..." in flat and "--preview [N]" in flat
    assert "memory: What is kept for the backward pass, and where. --gradient_checkpointing keep" in flat
    assert "None" not in text and "False" not in text and "_OR_PATH" not in text
    assert "(default:\n" not in text


def test_what_is_read_of_other_packages_without_their_import() -> None:
    assert machine.optimizer_names() == [name.value for name in OptimizerNames]
    assert machine.tracker_names() == list(integration_utils.INTEGRATION_TO_CALLBACK)
    built_in = {name: entry.needs for name, entry in REGISTRY.items() if entry.choose.__module__ == strategies.__name__}
    assert {name: built_in[name] for name in NEEDS} == NEEDS and built_in.keys() - NEEDS == {*strategies.SECOND_NAMES}


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tokentune {tokentune.__version__}\n"


def test_as_many_processes_that_tokenize_as_there_can_be() -> None:
    required = ["--model_name_or_path", "a/b", "--dataset_name_or_path", "c/d"]
    assert parse_arguments([*required, "--tokenize_workers", "1"]).data.tokenize_workers == 1
    with pytest.raises(UserError, match="--tokenize_workers 0: must be 1 or more"):
        parse_arguments([*required, "--tokenize_workers", "0"])
