"""`--config`: typed values, flags that override them, errors with their line, and a run that its own file repeats."""

import json
from pathlib import Path

import pytest
import yaml
from bad_input import check_sentence
from classification_models import save_tiny_bert, write_texts
from safetensors.torch import load_file

from tokentune import classify, estimate, finetune
from tokentune.cli.arguments import parse_arguments, parser_of
from tokentune.cli.config_file import read_config, write_config
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.finetune import FinetuneArguments
from tokentune.settings.run import STARTING

REQUIRED = "model_name_or_path: owner/model\ndataset_name_or_path: owner/data\n"


@pytest.fixture
def config(tmp_path: Path):
    """Writes a file of settings, the required ones first unless told otherwise; returns its path."""

    def write(text: str, *, required: str = REQUIRED) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(required + text, encoding="utf-8")
        return str(path)

    return write


def parsed(path: str, *words: str) -> dict:
    return parse_arguments(["--config", path, *words]).settings()


VALUES = [
    ("tokentune: true", {"tokentune": True}),
    ("--tokentune: yes", {"tokentune": True}),
    ("prefix-length: 0.3", {"prefix_length": "0.3"}),
    ("prefix_length: 16", {"prefix_length": "16"}),
    ("prefix_length: 1.0", {"prefix_length": "1.0"}),  # all tokens, not one
    ("learning_rate: 4e-4", {"learning_rate": 4e-4}),  # a text, in YAML 1.1
    ("learning_rate: 1", {"learning_rate": 1.0}),
    ("lora_target_modules: [q_proj, v_proj]", {"lora_target_modules": ["q_proj", "v_proj"]}),
    ("lora_target_modules:\n- q_proj\n- v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
    ("lora_target_modules: q_proj", {"lora_target_modules": ["q_proj"]}),
    ("lora: on", {"lora": True}),
    ("lora: 'true'", {"lora": True}),
    ("lora_r: '8'", {"lora_r": 8}),
    ("model_save_path: -x", {"model_save_path": "-x"}),
    ("lora_target_modules: []", {"lora_target_modules": []}),
    ("chunked_loss: on", {"chunked_loss": "on"}),  # a boolean, in YAML 1.1
    ("data_cache: none", {"data_cache": "none"}),
    ("max_steps: null", {"max_steps": None}),
    ("max_steps: 7", {"max_steps": 7}),
    ("report_to: []", {"report_to": []}),
    ("report_to: none", {"report_to": []}),
    ("optim_args: 'rank=64,scale=0.25'", {"optim_args": "rank=64,scale=0.25"}),
    ("# nothing but a remark", {}),
]


@pytest.mark.parametrize(("text", "expected"), VALUES, ids=[text for text, _ in VALUES])
def test_values(text: str, expected: dict, config) -> None:
    defaults = parse_arguments(["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data"])
    settings = parsed(config(text))
    assert settings == defaults.settings() | expected
    assert all(type(settings[name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lora_r 4", "lora_r", 4),
        ("--tokentune false", "tokentune", False),
        ("--lora_target_modules up_proj", "lora_target_modules", ["up_proj"]),
        ("--model_name_or_path other/model", "model_name_or_path", "other/model"),
        ("--report_to none", "report_to", []),
        ("--checkpoint_rest auto", "checkpoint_rest", "auto"),
    ],
)
def test_the_command_line_overrides_the_file(words: str, name: str, value: object, config) -> None:
    text = "lora_r: 32\ntokentune: true\nlora: true\nlora_target_modules: [q_proj, k_proj]\nreport_to: [tensorboard]\n"
    path = config(text + "gradient_checkpointing: true\ncheckpoint_rest: segments\n")
    for argv in (
        [*words.split(), "--config", path],
        ["--config", path, *words.split()],
        [f"--config={path}", *words.split()],
    ):
        settings = parse_arguments(argv).settings()
        assert settings[name] == value
        assert settings["lora"] is True and settings["gradient_checkpointing"] is True


REFUSED = [
    ("unknown key", "loar: 1", "line 3: 'loar' is no flag of this command; did you mean --lora?"),
    ("key of another world", "zzz: 1", "line 3: 'zzz' is no flag of this command; --help all lists all flags."),
    ("a second file", "config: o.yaml", "line 3: 'config' is no flag of this command; --help all lists all flags."),
    ("twice", "lora: true\nlora: false", "line 4: lora occurs twice. Leave one of them out."),
    ("twice, spelt in two ways", "lora_r: 1\n--lora-r: 2", "line 4: lora_r occurs twice. Leave one of them out."),
    ("a word for a number", "lora_r: eight", "line 3: argument --lora_r: invalid int value: 'eight'..."),
    ("a fraction for a count", "lora_r: 8.0", "line 3: argument --lora_r: invalid int value: '8.0'..."),
    ("infinity", "learning_rate: .inf", "line 3: argument --learning_rate: invalid float value..."),
    ("a word for a boolean", "lora: maybe", "line 3: argument --lora: 'maybe' is not true or false..."),
    ("nothing for a number", "lora_r:", "line 3: lora_r is empty (null)"),
    ("nothing for a text", "prefix_length: null", "line 3: prefix_length is empty (null)"),
    ("nothing in a list", "report_to: [~]", "line 3: report_to is empty (null)"),
    ("nothing for what is required", "seed: 1\nmodel_name_or_path: ~", "line 4: model_name_or_path occurs twice..."),
    ("a list for one", "lora_r: [8]", "line 3: lora_r takes one value, not a list"),
    ("a mapping for a list", "report_to: {a: b}", "line 3: report_to: a mapping is no value of a flag"),
    ("a list in a list", "report_to: [[a]]", "line 3: report_to: a list is no value of a flag"),
    ("no such choice", "checkpoint_rest: some", "line 3: argument --checkpoint_rest: invalid..."),
    (
        "a tag that would run something",
        "model_save_path: !!python/object/apply:os.getcwd []",
        "line 3: model_save_path takes one value, not a list",
    ),
    (
        "a tag on a text",
        "model_save_path: !!python/name:os.getcwd ''",
        "line 3: model_save_path: tag:yaml.org,2002:python/name:os.getcwd is no value of a flag",
    ),
    ("a merge key", "<<: {lora: true}", "line 3: '<<' is no flag of this command; --help all lists all flags."),
    ("a list as a key", "[lora]: true", "line 3: a list is no flag of this command; --help all lists all flags."),
    ("no YAML", "lora: [true", "line 3: not valid YAML: expected ',' or ']', but got '<stream end>'."),
    ("a tab", "lora:\n\ttrue", "line 4: not valid YAML: found character '\\t' that cannot start any token."),
    ("a stray colon", "lora: true: false", "line 3: not valid YAML: mapping values are not allowed here."),
    ("an unknown alias", "lora: *other", "line 3: not valid YAML: found undefined alias 'other'."),
    ("a control character", "lora: \x07", "line 3: not valid YAML: a character that it does not allow."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "sentence"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_refused(name: str, text: str, sentence: str, config) -> None:
    path = config(text)
    with pytest.raises(UserError) as refused:
        parse_arguments(["--config", path])
    check_sentence(str(refused.value), f"--config {path}, {sentence}")


@pytest.mark.parametrize("text", ["", "just a text", "- lora\n- qlora", "# a remark", "42"])
def test_file_that_holds_no_settings(text: str, config) -> None:
    path = config(text, required="")
    with pytest.raises(UserError) as refused:
        parse_arguments(["--config", path])
    assert str(refused.value) == f"--config {path}: expected flags with their values, one a line (learning_rate: 4e-4)."


def test_deeply_nested_file(config) -> None:
    path = config("lora: " + "[" * 20000, required="")
    with pytest.raises(UserError, match="nested too deeply"):
        parse_arguments(["--config", path])


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError) as refused:
            parse_arguments(["--config", str(path)])
        assert str(refused.value) == f"--config {path}: cannot be read: {reason}."
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model_save_path: café".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8 text \(byte 20\)"):
        parse_arguments(["--config", str(latin)])


def test_two_files(config) -> None:
    path = config("")
    with pytest.raises(UserError, match="--config is given 2 times: put the flags into one file"):
        parse_arguments(["--config", path, "--config", path])


def test_values_are_checked_as_flags_are(config) -> None:
    with pytest.raises(UserError, match=r"--lora_dropout 1\.0: must be at least 0 and below 1"):
        parsed(config("lora: true\nlora_dropout: 1"))


def test_a_file_without_its_flag_is_suggested(config) -> None:
    with pytest.raises(UserError, match=r"unexpected argument 'run.yaml', .*: did you mean --config run.yaml\?"):
        parsed(config(""), "--lora", "true", "run.yaml")


def test_paths_are_relative_to_the_current_folder(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    path = config("chat_template: ./t.jinja")
    monkeypatch.chdir(here)
    assert parsed(path)["chat_template"] == "./t.jinja"  # as the flag is: opened from where the command runs


def test_estimate_reads_it(config, capsys: pytest.CaptureFixture) -> None:
    text = "max_length: 64\nglobal_batch_size: 6\ngradient_accumulation_steps: 3\nfp16: true\nlora: true\n"
    text += "prefix_length: 0.5\ntokentune: true\n"
    words = ["--config", config(text, required="model_name_or_path: bert-base\n"), "--only"]
    arguments, subject = estimate.parse(words)
    assert (subject.sequences, subject.length) == (2, 64) and arguments.model.fp16
    assert arguments.selection.selected == 0.5
    _, subject = estimate.parse(["--config", config(text), "--model_name_or_path", "bert-base", "--max_length", "32"])
    assert (subject.sequences, subject.length) == (2, 32)


# ---- the file that a run leaves --------------------------------------------------------------------------------------

CLASSIFY = "--model_name_or_path m --dataset_name_or_path d.jsonl --eval_dataset_name_or_path e.jsonl --seeds 1 2"
COMMANDS = [
    (FinetuneArguments, "--model_name_or_path m --dataset_name_or_path a b --qlora --tokentune --prefix_length 0.3"),
    (FinetuneArguments, "--model_name_or_path m --dataset_name_or_path é.jsonl --learning_rate 1e-05 --report_to none"),
    (FinetuneArguments, "--model_name_or_path 12 --dataset_name_or_path null --optim_args on --chunked_loss on"),
    (ClassificationArguments, CLASSIFY),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[words for _, words in COMMANDS])
def test_settings_come_back(command: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    arguments = parse_arguments([*words.split(), "--overwrite_output_dir"], command)
    path = write_config(arguments, tmp_path, words.split(), {"torch": "2.13", "peft": None})
    text = path.read_text(encoding="utf-8")
    again = parse_arguments(["--config", str(path)], command)
    assert again.output.overwrite_output_dir is False
    arguments.output.overwrite_output_dir = False
    assert again == arguments
    assert yaml.safe_load(text).keys() == arguments.settings().keys() - set(STARTING)
    assert "hf_secret" not in text
    assert f"#     {command.prog} {words.split()[0]}" in text and "# with torch 2.13\n" in text


def test_a_line_break_in_an_argument_stays_in_the_heading(tmp_path: Path) -> None:
    arguments = parse_arguments(["--model_name_or_path", "m", "--dataset_name_or_path", "d"])
    path = write_config(arguments, tmp_path, ["--seed", "1\nlora: true\x85qlora: true\u2028fp16: true"], {})
    settings = read_config(str(path), parser_of(FinetuneArguments))
    assert settings["lora"] is settings["qlora"] is settings["fp16"] is False


@pytest.mark.parametrize("letter", ["\n", "\x00", "\x1b", "\u2028"])
def test_control_characters_are_refused(letter: str, config) -> None:
    """They would end up in messages, logs and folders' names."""
    with pytest.raises(UserError) as refused:
        parse_arguments(["--model_name_or_path", f"m{letter}", "--dataset_name_or_path", "d"])
    assert str(refused.value) == f"the command line: {f'm{letter}'!a} holds a control character."
    path = config(f"model_save_path: {json.dumps(f'm{letter}')}")
    with pytest.raises(UserError) as refused:
        parsed(path)
    assert str(refused.value) == (
        f"--config {path}, line 3: model_save_path: {f'm{letter}'!a} holds a control character."
    )


def test_a_run_is_repeated_by_its_file(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    words = "--global_batch_size 4 --warmup_steps 0 --learning_rate 5e-3 --max_length 96 --report_to none --seed 3 "
    words += "--lora --lora_dropout 0.1 --tokentune --prefix_length 0.3 --add_eos_token --max_steps 5"
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    finetune.main([*names, "--model_save_path", str(tmp_path), *words.split()])
    folder = tmp_path / "tiny-llama-tiny_alpaca-lora-tokentune-0.3"
    first = load_file(folder / "adapter_model.safetensors")
    settings = (folder / "run.yaml").read_text(encoding="utf-8").split("\n\n", 1)[1]

    (folder / "adapter_model.safetensors").unlink()
    finetune.main(["--config", str(folder / "run.yaml"), "--overwrite_output_dir"])
    again = load_file(folder / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    assert all(first[name].equal(again[name]) for name in first)
    assert (folder / "run.yaml").read_text(encoding="utf-8").split("\n\n", 1)[1] == settings

    finetune.main(["--config", str(folder / "run.yaml"), "--overwrite_output_dir", "--seed", "4"])
    other = load_file(folder / "adapter_model.safetensors")
    assert not all(first[name].equal(other[name]) for name in first)


def test_an_encoder_s_runs_are_repeated_by_their_file(tmp_path: Path) -> None:
    bert = save_tiny_bert(tmp_path / "tiny-bert")
    data = {split: write_texts(tmp_path / f"{split}.jsonl", 16, seed=seed) for seed, split in enumerate(("a", "b"))}
    names = ["--model_name_or_path", str(bert), "--dataset_name_or_path", str(data["a"])]
    names += ["--eval_dataset_name_or_path", str(data["b"]), "--model_save_path", str(tmp_path / "models")]
    words = "--num_epochs 1 --learning_rate 5e-3 --max_length 32 --seeds 1 2 --tokentune --prefix_length 8"
    classify.main([*names, *words.split(), "--report_to", "none"])
    (folder,) = (tmp_path / "models").iterdir()
    first = [load_file(folder / f"seed-{seed}" / "model.safetensors") for seed in (1, 2)]
    classify.main(["--config", str(folder / "run.yaml"), "--overwrite_output_dir"])
    for seed, weights in zip((1, 2), first, strict=True):
        again = load_file(folder / f"seed-{seed}" / "model.safetensors")
        assert all(weights[name].equal(again[name]) for name in weights)
