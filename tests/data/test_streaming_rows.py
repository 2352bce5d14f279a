"""Rows that are read while training: their order, draws, workers, mixtures, memory, and a run that is resumed."""

import json
import shutil
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import pandas
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from instruction_rows import TOKENIZER, stream, text, texts, write
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tokentune.data import streaming_rows
from tokentune.data.formats import record_files, records
from tokentune.errors import UserError
from tokentune.finetune import main


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(50)])


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_rows, "SHUFFLED_ROWS", 8)


def test_every_row_once_in_a_pass_in_another_order(numbered: str) -> None:
    rows = stream(numbered)
    seen = texts(rows, 200)
    assert seen == texts(rows, 200) == texts(stream(numbered), 200)  # deterministic, and begun anew
    assert seen != texts(stream(numbered, words="--seed 1"), 200)
    assert seen[:50] != [f"row {n}" for n in range(50)]
    counts = Counter(seen)
    assert len(counts) == 50 and set(counts.values()) <= {3, 4, 5}  # the buffer holds some back
    assert set(seen[:45]) <= {f"row {n}" for n in range(53)} and len(set(seen[:42])) == 42


def test_draws_are_of_the_row_and_its_pass(numbered: str) -> None:
    seeds: dict[str, list[int]] = {}
    for item in islice(stream(numbered), 300):
        seeds.setdefault(text(item), []).append(item["draw_seed"])
    every = [seed for drawn in seeds.values() for seed in drawn]
    assert len(set(every)) == len(every) == 300 and all(0 <= seed < 2**63 for seed in every)
    other = next(iter(stream(numbered, words="--seed 1")))
    assert other["draw_seed"] not in every


@pytest.mark.parametrize("hub", [False, True])
def test_the_same_batches_for_any_number_of_workers(hub: bool, numbered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` gives each worker some of a stream's files; here each has to read all."""
    if hub:
        streamed = Dataset.from_json(numbered).to_iterable_dataset(num_shards=3)
        monkeypatch.setattr(records, "load_dataset", lambda *_, **__: streamed)
    batches = {}
    for workers in (0, 1, 3):
        loader = DataLoader(
            stream("owner/data" if hub else numbered), batch_size=4, num_workers=workers, collate_fn=lambda items: items
        )
        batches[workers] = [batch for batch in islice(loader, 12)]
    assert batches[0] == batches[1] == batches[3]


def test_dropped_rows_make_the_batches_those_of_so_many_workers(tmp_path: Path) -> None:
    """`training/checkpoints/resuming.py` counts on this: one worker reads as none does, several do not after drops."""
    rows = [{"prompt": f"{n} ", "completion": "x" if n % 3 else ""} for n in range(50)]
    name, batches = write(tmp_path / "a.jsonl", rows), {}
    for workers in (0, 1, 3):
        loader = DataLoader(stream(name), batch_size=4, num_workers=workers, collate_fn=lambda items: items)
        batches[workers] = [batch for batch in islice(loader, 12)]
    assert batches[0] == batches[1] != batches[3]


def test_processes_share_each_batch(numbered: str) -> None:
    """As accelerate gives it to them: the first rows of what is a batch of all of them to the first, and so on."""
    alone = texts(stream(numbered), 48)
    for workers in (0, 2):
        shares = []
        for process in range(2):
            rows = stream(numbered, batch=2)
            rows.block = 4
            shard = IterableDatasetShard(rows, batch_size=2, num_processes=2, process_index=process)
            loader = DataLoader(
                shard, batch_size=2, num_workers=workers, collate_fn=lambda items: list(map(text, items))
            )
            shares.append(list(islice(loader, 12)))
        assert [row for both in zip(*shares, strict=True) for share in both for row in share] == alone


def test_several_data_sets(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{x}.jsonl", [{"text": f"{x} {n}"} for n in range(5)]) for x in "ab"]
    assert set(texts(stream(*names), 30)) == {f"{x} {n}" for x in "ab" for n in range(5)}
    weighted = Counter(word.split()[0] for word in texts(stream(*names, words="--dataset_weights 9 1"), 500))
    assert 420 < weighted["a"] < 475
    assert {word.split()[0] for word in texts(stream(*names, words="--dataset_weights 0 1"), 50)} == {"b"}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "saved", "hub"])
def test_every_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_files, "ROWS_AT_ONCE", 3)
    rows = [{"prompt": f"{n} ", "completion": "x", "data_source": ("airoboros", "y")[n % 2]} for n in range(20)]
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    asked = []

    def load_dataset(name: str, split: str, streaming: bool) -> IterableDataset:
        asked.append((name, split, streaming))
        return Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(records, "load_dataset", load_dataset)
    seen = texts(stream("owner/data" if kind == "hub" else str(path)), 60)
    assert set(seen) == {f"{n} x" for n in range(1, 20, 2)}
    assert asked == ([("owner/data", "train", True)] if kind == "hub" else [])


def test_conversations(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    item = next(iter(stream(write(tmp_path / "a.jsonl", [{"messages": chat}]))))
    assert TOKENIZER.decode([label for label in item["labels"] if label != -100]) == "ok<|im_end|>"


def test_a_bad_row_is_named_when_the_stream_comes_to_it(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [{"text": "x"}] * 20 + [{"text": 5}])
    rows = stream(name)
    with pytest.raises(UserError, match="row 21: 'text' is 5, not text"):
        texts(rows, 100)
    with pytest.raises(UserError, match="row 21: 'text' is 5, not text") as error:
        list(islice(DataLoader(rows, batch_size=4, num_workers=2, collate_fn=list), 50))
    assert "Traceback" not in str(error.value)


def test_nothing_to_learn_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_rows, "FRUITLESS_ROWS", 30)
    with pytest.raises(UserError, match="no token to learn is left in any of 30 rows"):
        texts(stream(write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": ""}])), 1)
    excluded = write(tmp_path / "b.jsonl", [{"text": "x", "data_source": "airoboros"}])
    with pytest.raises(UserError, match="holds no rows to train on"):
        texts(stream(excluded), 1)
    with pytest.raises(UserError, match="holds no rows to train on"):
        texts(stream(excluded, words="--dataset_weights 1"), 1)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB through a buffer of 100 kB of text."""
    monkeypatch.setattr(streaming_rows, "SHUFFLED_ROWS", 10_000)
    monkeypatch.setattr(streaming_rows, "SHUFFLED_CHARACTERS", 100_000)
    file = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": "x" * 20_000, "completion": "y"}) + "\n"
    with open(file, "w") as opened:
        for _ in range(2000):
            opened.write(line)
    rows = stream(str(file), words="--max_length 16")
    encoded = streaming_rows.TokenRow([1, 2], [-100, 2])
    monkeypatch.setattr(type(rows.sources[0].encoder), "encode", lambda self, items, notes: [encoded])
    tracemalloc.start()
    try:
        for _ in islice(rows, 1900):
            pass
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def train(model: Path, data: Path, folder: Path, words: str) -> Path:
    names = ["--model_name_or_path", str(model), "--dataset_name_or_path", str(data), "--model_save_path", str(folder)]
    short = (
        "--global_batch_size 4 --gradient_accumulation_steps 2 --warmup_steps 0 --learning_rate 5e-3 --max_length 64"
    )
    short += " --report_to none --skip_verification --skip_memory_probe --lora --tokentune --prefix_length 0.3"
    main([*names, *f"{short} --streaming {words}".split()])
    (run_folder,) = folder.iterdir()
    return run_folder


def test_a_run_that_is_resumed_is_the_run(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    words = "--max_steps 6 --save_steps 2 --add_eos_token"
    whole = train(tiny_llama_dir, alpaca_file, tmp_path / "whole", words)
    summary = json.loads((whole / "training_summary.json").read_text())
    assert summary["optimizer_steps"] == 6 and summary["data"]["train"] is None

    cut = tmp_path / "cut" / whole.name
    shutil.copytree(whole, cut)
    for name in ("training_summary.json", "adapter_model.safetensors"):
        (cut / name).unlink()
    for step in (4, 6):
        shutil.rmtree(cut / f"checkpoint-{step}", ignore_errors=True)
    train(tiny_llama_dir, alpaca_file, tmp_path / "cut", words + " --resume_from_checkpoint")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert sum(weight.abs().sum() for name, weight in weights[0].items() if "lora_B" in name) > 0
