"""classify.py on bad input: one clear sentence, exit code 2, nothing written, and no weight read before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import no_weights, refusal
from classification_models import (
    save_tiny_bert,
    save_tiny_vit,
    tiny_tokenizer,
    write_images,
    write_lines,
    write_texts,
    write_words,
)
from conftest import tiny_llama_config
from transformers import CanineConfig, CanineTokenizer, MambaConfig, T5Config

from tokentune import classify
from tokentune.cli.command import run_command


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.jsonl", 12, seed=0)


@pytest.fixture
def refused(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs the command on good input with some flags replaced; checks that it is refused, returns the message."""

    monkeypatch.setattr(classify, "prepare_model", no_weights)
    given = {"--model_name_or_path": bert, "--dataset_name_or_path": texts, "--eval_dataset_name_or_path": texts}
    given |= {"--max_length": 32, "--model_save_path": tmp_path / "models"}
    return lambda *words: refusal(classify.main, given, [word for word in words if word], tmp_path, capsys)


def rows(path: Path, *changes: dict, drop: str | None = None) -> Path:
    """Four good rows, the first ones changed."""
    good = [{"text": f"the sun {n}", "label": "warm" if n % 2 else "cold"} for n in range(4)]
    changed = [row | change for row, change in zip(good, [*changes, {}, {}, {}, {}], strict=False)]
    return write_lines(path, [{key: value for key, value in row.items() if key != drop} for row in changed])


def test_good_input_gets_as_far_as_the_weights(refused: Callable[..., str]) -> None:
    """Else every test below could pass for a reason that has nothing to do with it."""
    with pytest.raises(AssertionError, match="weights were about to be loaded"):
        refused("--tokentune", "--prefix_length", "4")


def test_kernels_without_masks(refused: Callable[..., str]) -> None:
    message = refused("--tokentune", "--attn_implementation", "flash_attention_2")
    assert message.startswith("--attn_implementation flash_attention_2 with --tokentune: the positions of selected")


# ---- labels ----------------------------------------------------------------------------------------------------------

ALL = [{"label": value} for value in (1.5, 2.0, 0.25, 1.0)]
LABELS = {
    "a list": ([{"label": [label]} for label in ("a", "b", "a", "b")], [], ["row 1", "'label' is ['a']", "not a list"]),
    "missing": ([{}, {"label": None}], [], ["row 2", "'label' is missing"]),
    "one class": ([{"label": "warm"}] * 4, [], ["every row has the same label, 'warm'"]),
    "fractions for a GLUE task": (ALL, ["--task_name", "cola", "--text_columns", "text"], ["type float", "acceptable"]),
    "texts for a number": ([], ["--task_name", "stsb", "--text_columns", "text"], ["str labels", "a number"]),
    "another number than the task has": (
        [{"label": n} for n in (0, 1, 2, 1)],
        ["--task_name", "cola", "--text_columns", "text"],
        ["row 3", "label 2 is none of this task's"],
    ),
    "the hub's unlabelled rows": (
        [{"label": n} for n in (0, 1, -1, 1)],
        ["--task_name", "cola", "--text_columns", "text"],
        ["row 3", "label -1"],
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_cannot_be_learnt(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    changes, words, told = LABELS[case]
    data = rows(tmp_path / "bad.jsonl", *changes)
    message = refused("--dataset_name_or_path", data, *words)
    assert all(part in message for part in (str(data), *told)), message


def test_mixed_labels(refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "bad.jsonl", {"label": 1})
    assert "'label'" in (message := refused("--dataset_name_or_path", data)) and str(data) in message


def test_label_of_validation_that_training_has_not(refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "validation.jsonl", {}, {"label": "tepid"})
    message = refused("--eval_dataset_name_or_path", data)
    assert f"--eval_dataset_name_or_path {data}, row 2" in message
    assert "'tepid'" in message and "'cold', 'warm'" in message


def test_text_among_numbers_to_predict(refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "numbers.jsonl", *ALL)
    message = refused("--dataset_name_or_path", data)
    assert "row 1" in message and "not a number as in the training data" in message


# ---- columns and texts -----------------------------------------------------------------------------------------------


def test_no_label_column(refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "bad.jsonl", drop="label")
    message = refused("--dataset_name_or_path", data)
    assert "'label'" in message and "'text'" in message and "--label_column" in message


@pytest.mark.parametrize("words", [("--text_columns", "sentence"), ("--label_column", "kind"), ("--task_name", "rte")])
def test_named_column_that_is_not_there(words: tuple[str, str], refused: Callable[..., str]) -> None:
    message = refused(*words)
    assert ("'sentence1'" if "rte" in words else f"'{words[1]}'") in message and "'text'" in message


def test_validation_lacks_a_column(refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "bad.jsonl", drop="label")
    message = refused("--eval_dataset_name_or_path", data)
    assert str(data) in message and "'label', which the training data has" in message


def test_no_column_of_texts(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [{"size": n, "label": n % 2} for n in range(4)])
    assert "no column of texts" in refused("--dataset_name_or_path", data)


def test_too_many_columns_of_texts(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [{"a": "x", "b": "y", "c": "z", "label": n} for n in range(2)])
    assert "name one or two with --text_columns" in refused("--dataset_name_or_path", data)


@pytest.mark.parametrize("flag", ["--dataset_name_or_path", "--eval_dataset_name_or_path"])
@pytest.mark.parametrize(("text", "told"), [("", "is empty"), ("  ", "is empty"), (None, "is missing")])
def test_empty_text(flag: str, text: str | None, told: str, refused: Callable[..., str], tmp_path: Path) -> None:
    data = rows(tmp_path / "bad.jsonl", {}, {}, {"text": text})
    message = refused(flag, data)
    assert f"{data}, row 3: 'text' {told}" in message


def test_no_validation_data(refused: Callable[..., str], texts: Path) -> None:
    message = refused("--dataset_name_or_path", texts, "--eval_dataset_name_or_path", "")
    assert "--eval_dataset_name_or_path" in message


def test_a_file_has_no_validation_split(bert: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["--model_name_or_path", str(bert), "--dataset_name_or_path", str(texts), "--max_length", "32"]
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: classify.main([*argv, "--model_save_path", str(tmp_path / "models")]))
    assert ended.value.code == 2 and "give --eval_dataset_name_or_path" in capsys.readouterr().err


# ---- words -----------------------------------------------------------------------------------------------------------

WORDS = {
    "fewer labels than words": ({"ner_tags": ["O", "O"]}, ["row 2", "2 labels for 3 words"]),
    "a text for words": ({"tokens": "we saw it"}, ["'tokens'"]),
    "no words": ({"tokens": [], "ner_tags": []}, ["row 2", "'tokens' is empty"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_do_not_fit_their_labels(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    change, told = WORDS[case]
    good = {"tokens": ["we", "saw", "oslo"], "ner_tags": ["O", "O", "B-place"]}
    data = write_lines(tmp_path / "bad.jsonl", [good, good | change, good])
    both = ("--dataset_name_or_path", data, "--eval_dataset_name_or_path", data)
    message = refused(*both, "--task_type", "token")
    assert all(part in message for part in (str(data), *told)), message


def test_one_label_for_a_list_of_words(refused: Callable[..., str], tmp_path: Path) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [{"tokens": ["we", "saw"], "label": n} for n in range(2)])
    message = refused("--dataset_name_or_path", data, "--task_type", "token")
    assert "row 1" in message and "not a list with one label for each word" in message


def test_label_of_a_word_that_training_has_not(refused: Callable[..., str], tmp_path: Path) -> None:
    train = write_words(tmp_path / "train.jsonl", 8, seed=0)
    data = write_lines(tmp_path / "v.jsonl", [{"tokens": ["we", "saw"], "ner_tags": ["O", "B-river"]}])
    both = ("--dataset_name_or_path", train, "--eval_dataset_name_or_path", data)
    message = refused(*both, "--task_type", "token")
    assert "row 1, word 2" in message and "'B-river'" in message


# ---- images ----------------------------------------------------------------------------------------------------------


def test_image_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    vit = save_tiny_vit(tmp_path / "tiny-vit")
    images = write_images(tmp_path / "bars", 8, seed=0)
    broken = images / "row" / "003.png"
    broken.write_bytes(b"no image")
    both = ("--dataset_name_or_path", images, "--eval_dataset_name_or_path", images)
    message = refused("--model_name_or_path", vit, "--task_type", "image", *both)
    assert str(broken) in message and "cannot be read" in message


def test_texts_for_images(refused: Callable[..., str], tmp_path: Path) -> None:
    vit = save_tiny_vit(tmp_path / "tiny-vit")
    message = refused("--model_name_or_path", vit, "--task_type", "image")
    assert "no column of images" in message
    message = refused("--model_name_or_path", vit, "--task_type", "image", "--text_columns", "text")
    assert "'text' holds no images" in message


# ---- model -----------------------------------------------------------------------------------------------------------


def folder_of(config: object, folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")  # weights are looked at by nobody here
    return folder


def test_model_that_pools_no_token(refused: Callable[..., str], tmp_path: Path) -> None:
    """A state-space model has no head for texts at all: there is no token that it would classify them by."""
    folder = folder_of(MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2), tmp_path / "mamba")
    message = refused("--model_name_or_path", folder)
    assert str(folder) in message and "a pooled token" in message


@pytest.mark.parametrize("number", [0, 7])
def test_a_head_that_looks_for_another_padding(number: int, refused: Callable[..., str], tmp_path: Path) -> None:
    """A decoder's head tells padding by the id in its configuration, the batch is padded by the tokenizer's."""
    folder = folder_of(tiny_llama_config(vocab_size=120, pad_token_id=number), tmp_path / "decoder")
    words = ("--model_name_or_path", folder, "--tokentune", "--prefix_length", "4")
    if number == tiny_tokenizer().pad_token_id:
        with pytest.raises(AssertionError, match="weights were about to be loaded"):
            refused(*words)
    else:
        assert "that is not number 7 (pad_token_id in config.json), and its tokenizer pads with number 0" in refused(
            *words
        )


def test_encoder_decoder_with_tokentune(refused: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    folder = folder_of(T5Config(vocab_size=120, **sizes), tmp_path / "t5")
    message = refused("--model_name_or_path", folder, "--tokentune")
    assert "--tokentune cannot serve this model" in message


def test_decoder_pools_its_last_token(refused: Callable[..., str], tmp_path: Path) -> None:
    """Not refused: transformers classifies by the last token in front of the padding, which is always selected."""
    folder = folder_of(tiny_llama_config(vocab_size=120), tmp_path / "llama")
    with pytest.raises(AssertionError, match="weights were about to be loaded"):
        refused("--model_name_or_path", folder, "--tokentune", "--prefix_length", "4")


def test_folder_with_a_configuration_alone(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = folder_of(tiny_llama_config(vocab_size=120), tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    assert "--from_scratch trains random ones" in refused("--model_name_or_path", folder)


@pytest.mark.parametrize("task_type", ["token", "text"])
def test_a_tokenizer_that_does_not_tell_the_words(task_type: str, refused: Callable[..., str], tmp_path: Path) -> None:
    folder = folder_of(CanineConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4), tmp_path / "canine")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    CanineTokenizer().save_pretrained(folder)
    words = ("--model_name_or_path", folder, "--task_type", task_type)
    if task_type == "text":  # whole texts need no words
        with pytest.raises(AssertionError, match="weights were about to be loaded"):
            refused(*words)
    else:
        data = write_words(tmp_path / "words.jsonl", 8, seed=0)
        message = refused(*words, "--dataset_name_or_path", data, "--eval_dataset_name_or_path", data)
        assert f"--task_type token: the tokenizer of {folder} (CanineTokenizer) does not tell which word" in message


def test_weights_in_4_bits_without_the_flag_for_them(refused: Callable[..., str], tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = folder_of(tiny_llama_config(vocab_size=120, quantization_config=quantization), tmp_path / "llama")
    assert f"{folder}: its weights are in 4 bits (bitsandbytes). Add --qlora" in refused("--model_name_or_path", folder)


def test_more_tokens_than_positions(refused: Callable[..., str]) -> None:
    assert "takes at most 64 tokens" in refused("--max_length", "65")


# ---- flags -----------------------------------------------------------------------------------------------------------

FLAGS = [
    ("--task_name cola --task_type token", "it does not go with --task_type token"),
    ("--task_name polka", "choose from cola, sst2"),
    ("--metric_for_best_model f2", "--metric_for_best_model f2: this task has accuracy, f1"),
    ("--metric_for_best_model pearson", "--metric_for_best_model pearson: this task has accuracy, f1"),
    ("--tokentune --selection labelled", "--selection labelled needs a label for each word"),
    ("--tokentune --prefix_length answers", "--prefix_length answers needs a label for each word"),
    ("--task_type token --tokentune --prefix_length answers --selection supervised", "it has nothing to choose"),
    ("--seeds 1 1", "one seed occurs twice"),
    ("--seeds 1 -2", "must be 0 or more"),
    ("--seeds 1 2 --push_to_hub me/x", "--push_to_hub uploads one model"),
    ("--max_train_rows 1", "--max_train_rows 1"),
    ("--global_batch_size 0", "--global_batch_size 0: must be 1 or more"),
    ("--text_columns a b c", "takes at most 2"),
    ("--task_type token --text_columns a b", "takes at most 1"),
    ("--task_type audio", "--task_type"),
    ("--from_scratch --lora", "--from_scratch with --lora"),
    ("--lora --lora_target_modules gate_proj", "no layer named gate_proj"),
    ("--prompt_template_name_or_path x.json", "unknown argument --prompt_template_name_or_path"),
]


@pytest.mark.parametrize(("words", "told"), FLAGS, ids=[words for words, _ in FLAGS])
def test_flags_that_do_not_go_together(words: str, told: str, refused: Callable[..., str]) -> None:
    assert told in refused(*words.split())


def test_no_data(bert: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: classify.main(["--model_name_or_path", str(bert)]))
    assert ended.value.code == 2 and "--task_name" in capsys.readouterr().err


def test_a_run_that_is_there(bert: Path, texts: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "models" / "tiny-bert-texts-text"
    folder.mkdir(parents=True)
    (folder / "classification_summary.json").write_text(json.dumps({}))
    assert "already holds a finished run" in refused()
