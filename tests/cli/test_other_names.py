"""Names of flags in other tools: understood where they mean the same, answered where they do not."""

from pathlib import Path

import pytest

from tokentune.cli import other_names
from tokentune.cli.arguments import _say_once, flags_given, parse_arguments, parser_of
from tokentune.cli.start import COMMANDS
from tokentune.errors import UserError

NEEDED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data"]
SAME = [
    ("--lr 4e-4", "learning_rate", 4e-4),
    ("--lr=4e-4", "learning_rate", 4e-4),
    ("--cutoff_len 64", "max_length", 64),
    ("--max-seq-length 64", "max_length", 64),
    ("--sequence_len 64", "max_length", 64),
    ("--num_train_epochs 3", "num_epochs", 3),
    ("--num_train_epochs 3.0", "num_epochs", 3),
    ("--num_train_epochs=3.0", "num_epochs", 3),
    ("--epochs 3", "num_epochs", 3),
    ("--load_in_4bit", "qlora", True),
    ("--load_in_4bit false", "qlora", False),
    ("--use_lora", "lora", True),
    ("--use_peft true", "lora", True),
    ("--lora_rank 4", "lora_r", 4),
    ("--target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
    ("--sample_packing", "packing", True),
    ("--optimizer sgd", "optim", "sgd"),
    ("--selected_tokens 0.3", "prefix_length", "0.3"),
    ("--selected-tokens 16", "prefix_length", "16"),
    ("--strategy random", "selection", "random"),
]


@pytest.mark.parametrize(("words", "flag", "value"), SAME, ids=[words for words, *_ in SAME])
def test_the_same_flag(words: str, flag: str, value: object) -> None:
    found = parse_arguments([*NEEDED, *words.split()]).settings()
    name = words.lstrip("-").replace("-", "_").split("=")[0].split()[0]
    assert found[flag] == value and type(found[flag]) is type(value) and name not in found


def test_required_flags_by_other_names(capsys: pytest.CaptureFixture) -> None:
    _say_once.cache_clear()
    for _ in range(2):
        arguments = parse_arguments(["--model", "owner/model", "--dataset", "a", "b", "--selected_tokens", "16"])
    assert arguments.model.model_name_or_path == "owner/model" and arguments.data.dataset_name_or_path == ["a", "b"]
    notes = "note: --model is read as --model_name_or_path; --dataset is read as --dataset_name_or_path\n"
    assert capsys.readouterr().err == notes  # once


def test_only_the_first_process_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    _say_once.cache_clear()
    parse_arguments([*NEEDED, "--lr", "1"])
    assert capsys.readouterr().err == ""


def test_a_fraction_of_an_epoch_is_not_rounded() -> None:
    for words in ("--epochs 1.5", "--num_epochs 3.0"):
        with pytest.raises(UserError, match="argument --num_epochs: invalid int value"):
            parse_arguments([*NEEDED, *words.split()])


@pytest.mark.parametrize("words", ["--lr 1 --learning_rate 2", "--learning-rate 1 --lr 2", "--lr=1 --learning_rate=1"])
def test_two_names_of_one_flag_are_refused(words: str) -> None:
    with pytest.raises(UserError, match=r"^--\w+ and --\w+ are the same flag: give one of them$"):
        parse_arguments([*NEEDED, *words.split()])


def test_keys_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text("base_model: m\ndatasets: d\n")
    with pytest.raises(UserError, match=r"line 2: 'datasets' is no flag of this command; --dataset_name_or_path takes"):
        parse_arguments(["--config", str(path)])
    path.write_text("base_model: m\ntrain_file: [a, b]\nnum_train_epochs: 3.0\nlr: 1e-3\n")
    _say_once.cache_clear()
    settings = parse_arguments(["--config", str(path), "--learning_rate", "2e-3"]).settings()
    assert settings["dataset_name_or_path"] == ["a", "b"] and settings["num_epochs"] == 3
    assert settings["learning_rate"] == 2e-3  # the command line overrides the file, by any name
    assert "; --train_file is read as --dataset_name_or_path; " in capsys.readouterr().err
    path.write_text("base_model: m\ntrain_file: a\nlr: 1e-3\nlearning_rate: 1e-3\n")
    with pytest.raises(UserError, match=r"line 4: lr and learning_rate are the same flag. Leave one of them out"):
        parse_arguments(["--config", str(path)])
    path.write_text("base_model: m\ntrain_file: a\noutput_dir: out\n")
    with pytest.raises(UserError, match=r"line 3: 'output_dir' is no flag of this command; .*--model_save_path"):
        parse_arguments(["--config", str(path)])


ANSWERED = [
    ("finetune", "--output_dir", "--model_save_path"),
    ("classify", "--output_dir", "--model_save_path"),
    ("finetune", "--output_dri", "--model_save_path"),
    ("finetune", "--per_device_train_batch_size", "--global_batch_size"),
    ("estimate", "--batch_size", "--global_batch_size"),
    ("finetune", "--micro_batch_size", "--gradient_accumulation_steps"),
    ("finetune", "--finetuning_type", "--lora or --qlora"),
    ("finetune", "--val_size", "--eval_fraction"),
    ("finetune", "--torch_dtype", "--base_dtype"),
    ("finetune", "--cutof_len", "did you mean --max_length?"),
    ("merge", "--model_name_or_path", "--base_model_name_or_path, and the adapter with --peft_model_path"),
]


@pytest.mark.parametrize(("command", "name", "instead"), ANSWERED)
def test_names_with_another_meaning(command: str, name: str, instead: str) -> None:
    with pytest.raises(UserError) as refused:
        flags_given([name, "x"], COMMANDS[command])
    assert str(refused.value).startswith(f"unknown argument {name}: ") and instead in str(refused.value)


@pytest.mark.parametrize(
    ("command", "words", "flag"),
    [
        ("merge", "--base_model b --adapter a --output o", "base_model_name_or_path peft_model_path output_dir"),
        ("merge", "--base_model_path b --lora_path a --output_dir o", "base_model_name_or_path peft_model_path"),
        ("estimate", "--model llama-3-8b --num_gpus 8", "model_name_or_path num_processes"),
        ("classify", "--model m --test_file t --max_train_samples 8", "test_dataset_name_or_path max_train_rows"),
        ("classify", "--model m --warmup_ratio 0.1", "warmup_steps"),
        ("diagnose", "--model m --dataset d --per_device_train_batch_size 2", "micro_batch_size"),
    ],
)
def test_other_commands(command: str, words: str, flag: str) -> None:
    assert set(flag.split()) <= flags_given(words.split(), COMMANDS[command]).keys()


def test_the_former_name_of_selections(capsys: pytest.CaptureFixture) -> None:
    _say_once.cache_clear()
    given = flags_given(["--model", "m", "--dataset", "d", "--strategies", "random", "loss"], COMMANDS["diagnose"])
    assert given["selections"] == ["random", "loss"]
    assert "; --strategies is called --selections now\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_no_guess_deletes_or_publishes(name: str) -> None:
    """However a flag is misspelt."""
    parser = parser_of(COMMANDS[name])
    for flag in set(other_names.NEVER_GUESSED) & parser.flags:
        for typed in {flag[:-1], flag[1:], f"{flag}s", flag.replace("_", "")} - {flag}:
            with pytest.raises(UserError) as refused:
                parser.read([f"--{typed}"])
            said = str(refused.value).removeprefix(f"unknown argument --{typed}")
            assert not any(f"--{other}" in said for other in other_names.NEVER_GUESSED)


def test_every_name_leads_to_one_flag_or_an_answer() -> None:
    parsers = [parser_of(command) for command in COMMANDS.values()]
    tables = (other_names.SECOND, other_names.FORMER, other_names.SAME)
    for table in tables:
        assert table.keys() <= set().union(*(parser.flags for parser in parsers))
    other = other_names.synonyms({"model_name_or_path", "base_model_name_or_path"})  # in whichever order
    assert other["base_model"] == "base_model_name_or_path" and other["model"] == "model_name_or_path"
    for names, answer, *_ in other_names.ANSWERS:
        for name in names.split():
            said = [other_names.what_instead(name, parser.flags, parser.other_names) for parser in parsers]
            assert any(answer in (words or "") for words in said), name
