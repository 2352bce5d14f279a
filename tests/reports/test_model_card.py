"""Model cards: valid metadata, what was measured, nothing made up, no card of the user's own replaced."""

import copy

import pytest
from adapters_on_disk import make_adapter
from classification_models import save_tiny_bert, write_texts
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from tokentune import classify, finetune
from tokentune.card_file import MARK, own_card
from tokentune.file_names import CARD_NAME
from tokentune.merge import merge
from tokentune.reports.model_card import write_merged_card, write_model_card
from tokentune.sampling.strategies import REGISTRY, strategy_names

SUMMARY = {
    "settings": {
        "model_name_or_path": "owner/llama-tiny",
        "dataset_name_or_path": ["owner/rows", "/home/me/private/more.jsonl"],
        "eval_dataset_name_or_path": None,
        "tokentune": True,
        "prefix_length": "0.3",
        "selection": "random",
        "lora": True,
        "qlora": False,
        "lora_r": 8,
        "lora_target_modules": ["up_proj", "down_proj"],
        "learning_rate": 4e-4,
        "model_save_path": "/home/me/private/models",
    },
    "model": {"class": "LlamaForCausalLM", "parameters": 5_000_000},
    "data": {"train": {"rows": 1200, "tokens": 34567, "dropped_rows": 0}, "validation": None},
    "optimizer_steps": 17,
    "tokens": {"processed": 34567, "supervised": 2345, "selected": 10370, "selected_supervised": 703},
    "loss": {"first": 3.25, "last": 2.125, "window": 10},
    "validation_loss": {"base": 3.5, "final": 2.25, "steps": []},
    "peak_memory_bytes": 3 * 2**30,
    "saved_for_backward_bytes": 2**29,
    "tokens_per_second": 1234.5,
    "device": {"type": "cpu", "name": "A processor", "count": 2},
    "versions": {"tokentune": "0.1", "torch": "2.13.0", "bitsandbytes": None},
}
DIFFERENCE = {"largest": 0.1, "relative": 0.05, "rms": 0.01, "relative_rms": 0.005}
MERGED = {
    "base_model_name_or_path": "owner/llama-tiny",
    "peft_model_path": "/home/me/private/models/my-run",
    "task_type": None,
    "dtype": "bfloat16",
    "logit_difference": {"in_dtype": DIFFERENCE, "in_float32": DIFFERENCE},
    "qlora": None,
    "versions": {"torch": "2.13.0"},
}


def changed(**settings) -> dict:
    summary = copy.deepcopy(SUMMARY)
    summary["settings"] |= settings
    return summary


def written(summary, folder) -> ModelCard:
    return ModelCard.load(write_model_card(summary, folder))


def test_metadata(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    data = written(SUMMARY, folder).data
    assert data.base_model == "owner/llama-tiny" and data.datasets == ["owner/rows"]  # a local file is on no hub
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert data.tags == ["tokentune", "lora"] and data.license is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("loss", 2.25, "validation")
    assert result.dataset_name == "owner/rows + more.jsonl"  # where its validation rows were split from
    assert data.model_name == "my-run"


def test_text(tmp_path):
    text = written(SUMMARY, tmp_path).text
    for words in (
        "of every training sequence, 30 % of the tokens, drawn at random",
        "adapters of rank 8 on up_proj, down_proj",
        "| training loss, first and last, means of 10 steps | 3.25, 2.125 |",
        "| validation loss, before and after | 3.5, 2.25 |",
        "| peak memory | 3.00 GiB |",
        "| kept for the backward pass | 0.50 GiB |",
        "| train | rows 1,200, tokens 34,567 |",
        "selected supervised | 703 |",
        "`learning_rate` | `0.0004` |",
        "torch 2.13.0",
        "simoulin-etal-2024-memory",
        'pipeline("text-generation", path, tokenizer=path, generation_config=ends)',
        "`tokentune chat path/of/this/model`.",
    ):
        assert words in text, words
    assert text.rstrip().endswith(MARK)
    assert "/home/me" not in text and "`more.jsonl`" in text  # paths stay at home
    assert "bitsandbytes" not in text.partition("## Versions")[2].partition("## Citation")[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prefix_length": "16"}, "16 tokens, drawn at random"),
        ({"qlora": True}, "over a 4-bit base (QLoRA)"),
        ({"tokentune": False, "lora": False}, "Trained are all weights"),
        ({"prefix_length": "answers"}, "sequence, all tokens whose output has a loss kept"),
        (
            {"prefix_length": "answers+0.1"},
            "whose output has a loss and 10 % of the other tokens, drawn at random each time it is seen, kept",
        ),
        (
            {"prefix_length": "answers+0.1", "selection": "stratified"},
            "10 % of the other tokens, evenly over it, drawn at random each time",
        ),
        ({"prefix_length": "answers+0.3:answers"}, "loss and 30 to 0 % of the other tokens, drawn at random"),
        ({"prefix_length": "16:64"}, "sequence, 16 to 64 tokens, drawn at random"),
        (
            {"prefix_length": "16", "gradient_correction": 1.0},
            "on average 16 tokens, each drawn on its own each time it is seen, kept",
        ),
        (
            {"selection": "labelled", "task_type": "token"},
            "words inside of entities first, then other words, then the rest; among equals drawn at random each time",
        ),
        ({"prefix_length": "0.1:0.5"}, "10 to 50 % of the tokens, drawn at random"),
        (
            {"selection": "stratified"},
            "evenly over it, drawn at random each time it is seen (`--sel",
        ),
        (
            {"selection": "supervised"},
            "of the tokens, those with a loss first, then others; among equals drawn at random each time it is seen",
        ),
        ({"task_type": "text"}, "drawn at random each time it is seen (a token that the head pools always), kept"),
        ({"selection": "contiguous"}, "in a window drawn at random each time it is seen (`--selection contiguous`)"),
        ({"selection": "loss"}, "drawn in proportion to scores of a first pass over all tokens (`--selection loss`)"),
        ({"selection": "loss", "selection_draw": "top"}, "those with the highest scores of a first pass"),
        ({"selection": "/home/me/mine.py:rare"}, "chosen by a strategy of its own (`--selection mine.py:rare`)"),
        ({"lora": False}, "Fine-tuned from"),
    ],
)
def test_methods(tmp_path, settings, words):
    card = written(changed(**settings), tmp_path)
    assert words in card.text
    assert ("simoulin" in card.text) == settings.get("tokentune", True)
    assert card.data.library_name == ("peft" if settings.get("lora", True) else "transformers")


def test_every_strategy_is_told_as_what_it_is(tmp_path):
    """Only a draw of all tokens alike is told as one; the rest name their flag."""
    for name in (
        name for name in strategy_names() if REGISTRY[name].choose.__module__ == "tokentune.sampling.strategies"
    ):
        text = written(changed(selection=name), tmp_path).text
        plain = "30 % of the tokens, drawn at random each time it is seen, kept" in text
        assert plain == (name == "random") != (f"(`--selection {name}`)" in text), name
        assert "strategy of its own" not in text


def test_a_local_base_is_named_but_not_linked(tmp_path):
    card = written(changed(model_name_or_path="/home/me/models/my-base", dataset_name_or_path="x.jsonl"), tmp_path)
    assert card.data.base_model is None and card.data.datasets is None
    assert "`my-base`" in card.text and "/home" not in card.content


def test_nothing_is_made_up(tmp_path):
    """No validation data, a loss that is no number, a summary of little: left out."""
    summary = changed() | {"validation_loss": None, "loss": {"first": None, "last": 2.0}, "peak_memory_bytes": None}
    card = written(summary, tmp_path)
    assert card.data.eval_results is None and "validation" not in card.text.partition("## Settings")[0]
    assert "| none, 2 |" in card.text and "peak memory" not in card.text
    least = {"settings": {"model_name_or_path": "a/b", "lora": True}}
    assert "data that is not recorded" in written(least, tmp_path).text


def test_classifiers(tmp_path):
    best = {"best": {"score": 0.9, "step": 3, "metrics": {}}, "metric": "accuracy"}
    best["validation_loss"] = {"base": None, "final": 0.25, "steps": []}  # not evaluated before training
    best["test"] = {"metric": "f1", "score": 0.8, "metrics": {}}
    settings = {"task_type": "token", "test_dataset_name_or_path": "/home/me/test.jsonl"}
    card = written(changed(**settings) | best, tmp_path)
    assert card.data.pipeline_tag == "token-classification"
    assert [
        (result.metric_type, result.metric_value, result.dataset_split, result.dataset_name)
        for result in card.data.eval_results
    ] == [("accuracy", 0.9, "validation", "owner/rows + more.jsonl"), ("f1", 0.8, "test", "test.jsonl")]
    assert 'PeftModel.from_pretrained(base, "path/of/this/adapter")' in card.text
    assert "AutoModelForTokenClassification" in card.text
    for row in ("| validation loss | 0.25 |", "| validation accuracy | 0.9 |", "| test f1 | 0.8 |"):
        assert f"\n{row}\n" in card.text
    assert "before and after" not in card.text


def test_a_card_of_the_users_own_stays(tmp_path):
    (tmp_path / CARD_NAME).write_text("# Mine\n")
    assert write_model_card(SUMMARY, tmp_path) is None
    assert (tmp_path / CARD_NAME).read_text() == "# Mine\n" == own_card(tmp_path)
    (tmp_path / CARD_NAME).unlink()
    path = write_model_card(SUMMARY, tmp_path)
    assert own_card(tmp_path) is None
    assert write_model_card(changed(lora=False), tmp_path) == path  # ours is replaced
    path.write_text(path.read_text().replace(MARK, ""))
    assert write_model_card(SUMMARY, tmp_path) is None  # made the user's own


def test_the_blank_card_of_peft_is_replaced(tmp_path, tiny_llama_dir):
    make_adapter(tiny_llama_dir, tmp_path)
    assert "Model Card for Model ID" in (tmp_path / CARD_NAME).read_text()
    assert "TokenTune" in written(SUMMARY, tmp_path).text
    make_adapter(tiny_llama_dir, tmp_path)  # peft adds to a card that it finds
    assert own_card(tmp_path) is None


@pytest.mark.parametrize("known", [True, False])
def test_merged(tmp_path, known):
    qlora = {"base": "dequantized", "from_training": {"16bit": DIFFERENCE, "dequantized": DIFFERENCE}}
    write_merged_card(MERGED | {"qlora": qlora}, SUMMARY if known else None, tmp_path, name="my-run-merged")
    card = ModelCard.load(tmp_path / CARD_NAME)
    assert card.data.library_name == "transformers" and card.data.base_model == "owner/llama-tiny"
    assert "with the adapter my-run folded into its weights" in card.text and "/home/me" not in card.content
    assert "| base + adapter, computed in bfloat16 | 0.5 % | 5 % |" in card.text
    assert "This model: folded into the dequantised 4-bit base." in card.text
    assert ("## Method" in card.text) == known
    assert card.data.pipeline_tag == "text-generation" and card.data.eval_results is None  # none was measured
    write_merged_card(MERGED, None, tmp_path, name="x", own="# Mine\n")
    assert (tmp_path / CARD_NAME).read_text() == "# Mine\n"


# The commands


def test_finetune_leaves_a_card_and_its_users_own(tiny_llama_dir, alpaca_file, tmp_path):
    words = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path {alpaca_file} --model_save_path {tmp_path} "
    words += "--global_batch_size 4 --max_steps 2 --warmup_steps 0 --max_length 128 --report_to none "
    words += "--lora --tokentune --prefix_length 0.5 --skip_memory_probe --overwrite_output_dir"
    finetune.main(words.split())
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    card = ModelCard.load(folder / CARD_NAME)
    assert "50 % of the tokens" in card.text and card.data.base_model is None
    (folder / CARD_NAME).write_text("# Mine\n")
    finetune.main(words.split())
    assert (folder / CARD_NAME).read_text() == "# Mine\n"


def test_a_classifiers_adapter_from_training_to_the_merged_model(tmp_path):
    base, rows = save_tiny_bert(tmp_path / "base"), write_texts(tmp_path / "rows.jsonl", 24, seed=1)
    words = f"--model_name_or_path {base} --dataset_name_or_path {rows} --eval_dataset_name_or_path {rows} "
    words += f"--model_save_path {tmp_path / 'models'} --global_batch_size 8 --num_epochs 1 --max_length 32 "
    words += "--report_to none --lora --learning_rate 1e-2 --tokentune --prefix_length 0.5"
    classify.main(words.split())
    (folder,) = (tmp_path / "models").glob("*lora*")
    card = ModelCard.load(folder / CARD_NAME)
    assert card.data.pipeline_tag == "text-classification" and card.data.eval_results[0].metric_type == "accuracy"
    merge(str(base), str(folder), str(folder / "merged"))
    card = ModelCard.load(folder / "merged" / CARD_NAME)
    assert card.data.pipeline_tag == "text-classification" and "AutoModelForSequenceClassification" in card.text
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert merged.config.id2label == {0: "cold", 1: "warm"}
