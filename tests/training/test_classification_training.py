"""The trainer of encoders: one update for every split into micro-batches, the pooled token, padding, draws."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classification_models import (
    save_tiny_bert,
    save_tiny_vit,
    tiny_tokenizer,
    write_images,
    write_texts,
    write_words,
)
from torch import Tensor, nn
from transformers import BertForSequenceClassification, ModernBertConfig, ModernBertForSequenceClassification

from tokentune import apply_tokentune
from tokentune.classify import main
from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import SeededRows
from tokentune.data.labelled.splits import ClassificationData, configured, load_data, load_processing
from tokentune.models.builder import prepare_model
from tokentune.models.pretrained import load_config
from tokentune.models.tasks import HEADS, head_modules
from tokentune.settings.classification import ClassificationArguments
from tokentune.training.checkpoints.run_state import load_best_weights
from tokentune.training.classification import (
    build_classification_trainer,
    classification_settings,
    tokens_per_image,
)
from tokentune.training.trainer import SelectiveTrainer

ROWS = 19  # no multiple of any batch below: the last accumulation window is partial, in rows and in micro-batches


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Model and data of each type of task."""
    folder = tmp_path_factory.mktemp("classification")
    bert, vit = save_tiny_bert(folder / "tiny-bert"), save_tiny_vit(folder / "tiny-vit")
    return {
        "text": (bert, write_texts(folder / "texts.jsonl", ROWS, seed=0)),
        "token": (bert, write_words(folder / "words.jsonl", ROWS, seed=0)),
        "image": (vit, write_images(folder / "bars", ROWS, seed=0)),
    }


@pytest.fixture
def make_trainer(places: dict[str, tuple[Path, Path]], tmp_path: Path) -> Callable[..., SelectiveTrainer]:
    """Builds a trainer in float64 from flags, as the command does."""

    def make(task_type: str, words: str) -> SelectiveTrainer:
        model, data = places[task_type]
        given = {"model_name_or_path": model, "dataset_name_or_path": data, "eval_dataset_name_or_path": data}
        fixed = ["--warmup_steps", "0", "--report_to", "none", "--max_length", "32", "--num_epochs", "1"]
        argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        arguments = parse_arguments([*argv, *fixed, "--task_type", task_type, *words.split()], ClassificationArguments)
        config = load_config(str(model), head=HEADS[task_type])
        processing = load_processing(arguments, config)
        rows: ClassificationData = load_data(arguments, config, processing)
        config = configured(config, rows.labels, processing)
        torch.manual_seed(0)
        trained = prepare_model(arguments, torch.float32, HEADS[task_type], config).double()
        settings = classification_settings(arguments, tmp_path / "run", "loss")
        seeded = SeededRows(rows.train.rows, arguments.optimization.seed)
        return build_classification_trainer(
            trained, settings, seeded, rows.validation.rows, processing, arguments, rows.labels
        )

    return make


def update_of(trainer: SelectiveTrainer) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return {name: p.detach() - before[name] for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- the update does not depend on how a global batch is cut ---------------------------------------------------------


@pytest.mark.parametrize("method", ["", "--tokentune --prefix_length 0.4"])
@pytest.mark.parametrize("task_type", ["text", "token", "image"])
def test_accumulation_gives_the_same_update(
    task_type: str, method: str, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    """BERT's own loss averages each micro-batch: with it the last, partial window would weigh more."""
    updates = {}
    for accumulation in (8, 2, 1):
        words = f"--global_batch_size 8 --gradient_accumulation_steps {accumulation} --optim sgd --weight_decay 0"
        trainer = make_trainer(task_type, f"{words} --learning_rate 1e-1 {method}")
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        updates[accumulation] = update_of(trainer)
        assert trainer.state.global_step == math.ceil(ROWS / 8)
    assert sum(update.abs().sum() for update in updates[8].values()) > 1e-3
    for accumulation in (2, 1):
        for name, update in updates[8].items():
            torch.testing.assert_close(updates[accumulation][name], update, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("task_type", ["text", "token", "image"])
def test_evaluation_is_the_plain_model_on_all_rows(
    task_type: str, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    """Whatever is selected in training, and however the rows are put into batches."""
    trainer = make_trainer(task_type, "--tokentune --prefix_length 2 --global_batch_size 8")
    figures = trainer.evaluate()
    model, total, count = trainer.model.eval(), 0.0, 0
    collate = trainer.eval_collator
    for row in range(ROWS):
        batch = collate([trainer.eval_dataset[row]])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = type(model).forward(model, **batch).logits
        known = labels.flatten() != -100
        total += nn.functional.cross_entropy(
            logits.flatten(0, -2)[known], labels.flatten()[known], reduction="sum"
        ).item()
        count += int(known.sum())
    assert figures["eval_loss"] == pytest.approx(total / count, rel=1e-5)


# ---- pooling and padding ---------------------------------------------------------------------------------------------


def text_batches(make_trainer: Callable[..., SelectiveTrainer]) -> tuple[SelectiveTrainer, list[dict[str, Tensor]]]:
    trainer = make_trainer("text", "--tokentune --prefix_length 3 --global_batch_size 8")
    return trainer, list(trainer.get_train_dataloader())


def test_the_pooled_token_is_selected_in_every_row(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    for task_type in ("text", "image"):
        trainer = make_trainer(task_type, "--tokentune --prefix_length 3 --global_batch_size 8")
        for batch in trainer.get_train_dataloader():
            assert (batch["selected_positions"][:, 0] == 0).all()
            assert batch["selected_positions"].shape[1] == 3


def test_pooled_output_is_the_same_in_training_and_in_evaluation(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer, batches = text_batches(make_trainer)
    for batch in batches:
        batch.pop("labels")
        positions = batch.pop("selected_positions")
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        in_training = trainer.model.train()(**batch, selected_positions=positions).logits
        with torch.no_grad():
            in_evaluation = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(in_training.detach(), in_evaluation, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_never_enters(pooling: str) -> None:
    """Logits of a row alone and beside a longer one, in training with a selection and in evaluation."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(
        **sizes, **tokens, vocab_size=len(tokenizer), classifier_pooling=pooling, num_labels=2, local_attention=6
    )
    model = apply_tokentune(ModernBertForSequenceClassification(config).double())
    alone = tokenizer(["the sun was warm"], return_tensors="pt")
    beside = tokenizer(["the sun was warm", "we saw it again and again there was a fire"], padding=True)
    beside = {name: torch.tensor(values) for name, values in beside.items()}
    beside["input_ids"][0, alone["input_ids"].shape[1] :] = 9  # any token: nothing but the mask tells padding
    positions = torch.tensor([[0, 2, 4]])
    for training in (False, True):
        options = [{"selected_positions": positions}, {"selected_positions": positions.expand(2, -1)}]
        options = options if training else [{}, {}]
        model.train(training)
        keep = [name for name in alone if name != "token_type_ids"]
        one = model(**{name: alone[name] for name in keep}, **options[0]).logits[0]
        two = model(**{name: beside[name] for name in keep}, **options[1]).logits[0]
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


def test_mean_pooling_says_what_training_uses(
    places: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole sequence, as in evaluation: nothing of the pooled vector changes with the selection."""
    folder = tmp_path / "tiny-modernbert"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(
        **sizes, **tokens, vocab_size=len(tokenizer), classifier_pooling="mean", num_labels=2, local_attention=6
    )
    config.max_position_embeddings = 64
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(config)
    model.save_pretrained(folder)
    data = str(places["text"][1])
    words = f"--model_name_or_path {folder} --dataset_name_or_path {data} --eval_dataset_name_or_path {data} "
    words += f"--model_save_path {tmp_path / 'models'} --max_length 32 --num_epochs 1 --report_to none "
    with caplog.at_level(logging.INFO, logger="tokentune"):
        main([*words.split(), "--tokentune", "--prefix_length", "3"])
    assert "pools all tokens" in caplog.text and "evaluation is the ordinary forward pass" in caplog.text

    patched = apply_tokentune(model.double())
    batch = {k: v for k, v in tokenizer(["the sun was warm again"], return_tensors="pt").items() if "type" not in k}
    pooled = [patched.train()(**batch, selected_positions=torch.tensor([at])).logits for at in ([0, 1], [3, 4])]
    plain = patched.eval()(**batch).logits
    torch.testing.assert_close(pooled[0], plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pooled[1], plain, rtol=1e-9, atol=1e-12)


# ---- images, heads, counts -------------------------------------------------------------------------------------------


def test_tokens_per_image_are_patches_and_class_token(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer("image", "--tokentune --prefix_length 0.5")
    pixels = trainer.train_dataset[0]["pixel_values"]
    assert tokens_per_image(trainer.model, pixels) == 17 == trainer.data_collator.tokens_per_image
    batch = next(iter(trainer.get_train_dataloader()))
    assert [int(count) for count in trainer.data_collator.count(batch)] == [19 * 17, 19 * 9, 19]


def test_head_is_what_lies_outside_of_the_base_and_its_pooler(places: dict[str, tuple[Path, Path]]) -> None:
    model = BertForSequenceClassification.from_pretrained(places["text"][0])
    assert head_modules(model) == ["bert.pooler", "classifier"]


def test_adapters_train_the_head_whole(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer("text", "--lora --tokentune --prefix_length 3 --learning_rate 1e-2")
    moved = {name for name, update in update_of(trainer).items() if update.abs().sum() > 0}
    assert any("classifier" in name and "modules_to_save" in name for name in moved)
    assert any("pooler" in name and "modules_to_save" in name for name in moved)
    assert any("lora_B" in name for name in moved)
    assert not any("classifier" in name and "lora" in name for name in moved)


def test_weights_that_the_checkpoint_lacks(
    tmp_path: Path, places: dict[str, tuple[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """A new pooler is learnt and said; a layer that is not there is refused (tests/models/test_loading.py)."""
    bert = save_tiny_bert(tmp_path / "masked", pooler=False)
    data = str(places["text"][1])
    words = f"--model_name_or_path {bert} --dataset_name_or_path {data} --eval_dataset_name_or_path {data} "
    words += f"--model_save_path {tmp_path / 'models'} --max_length 32 --num_epochs 1 --report_to none"
    with caplog.at_level(logging.INFO, logger="tokentune"):
        main(words.split())
    (said,) = [line for line in caplog.messages if "learnt from the start" in line]
    assert "bert.pooler.dense.weight" in said and "classifier.weight" in said and "layer" not in said


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", ["", "--lora --lora_target_modules all-linear"], ids=["full", "lora"])
@pytest.mark.parametrize("task_type", ["text", "token", "image"])
def test_the_best_checkpoint_comes_back_whole(
    task_type: str, adapters: str, make_trainer: Callable[..., SelectiveTrainer], tmp_path: Path
) -> None:
    """ViT's weights have other names in the file than in memory."""
    trainer = make_trainer(task_type, adapters)
    trainer.save_model(str(tmp_path / "checkpoint"))
    best = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint")
    trainer.state.best_global_step, trainer.state.best_metric = 1, 0.5
    load_best_weights(trainer)
    for name, parameter in trainer.model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, best[name].to(parameter.dtype)), name
