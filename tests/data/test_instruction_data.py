"""From names on the command line to rows: formats, mixtures, the split, long rows, and the flags' refusals."""

import json
import logging
import tracemalloc
from pathlib import Path

import pandas
import pytest
from chat_tokenizers import CHATML, TOOLS, chat_tokenizer
from datasets import Dataset
from instruction_rows import ALPACA, CHAT, SHAREGPT, TEMPLATE, answers, arguments, load, refused, write
from transformers import AutoTokenizer

from tokentune.data.formats import json_files, records
from tokentune.data.formats.data_formats import Answer
from tokentune.data.instruction_data import mixture_counts, mixture_rows
from tokentune.data.record_encoding import held_out
from tokentune.errors import UserError
from tokentune.finetune import main

# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"instruction": "a", "output": "ok"}, "alpaca", ["ok"]),
        ({"instruction": "a", "input": None, "output": "ok", "text": "whole"}, "alpaca", ["ok"]),
        ({"prompt": "a", "completion": " ok"}, "prompt_completion", [" ok"]),
        ({"prompt": CHAT, "completion": CHAT[1:]}, "prompt_completion", ["ok<|im_end|>"]),
        ({"prompt": [], "completion": CHAT}, "prompt_completion", ["ok<|im_end|>"]),
        ({"messages": CHAT, "id": 5}, "messages", ["ok<|im_end|>"]),
        ({"conversations": CHAT}, "messages", ["ok<|im_end|>"]),
        ({"conversations": SHAREGPT, "system": "s"}, "sharegpt", ["ok<|im_end|>"]),
        ({"text": "all of it", "id": 5}, "text", ["all of it"]),
    ],
)
def test_formats_are_told_by_columns(row: dict, kind: str, expected: list[str], tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [row, row]))
    assert data.sources[0].data_format == kind
    assert answers(data) == [expected] * 2
    assert data.train.column_names == ["input_ids", "labels"]


def test_formats_named_by_the_flag(tmp_path: Path) -> None:
    both = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "ok", "messages": CHAT, "text": "all"}])
    assert "fit several formats (alpaca, messages): name one with --data_format" in refused(both)
    for kind, expected in (("alpaca", "ok"), ("messages", "ok<|im_end|>"), ("text", "all")):
        assert answers(load(both, words=f"--data_format {kind}")) == [[expected]]
    assert "no column 'conversations', which" not in refused(both, words="--data_format sharegpt")
    message = refused(both, words="--data_format prompt_completion")
    assert "no column 'prompt', 'completion', which --data_format prompt_completion needs. It has" in message


def test_unknown_columns_are_listed_with_what_each_format_needs(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]))
    assert "It has 'question', 'answer'." in message
    for part in ("'instruction', 'output'", "'prompt', 'completion'", "'messages'", "'conversations'", "'text'"):
        assert part in message


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", "saved"])
def test_conversations_in_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    """Arrow fills the keys of every struct with nulls; a CSV cell holds JSON."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = [{"messages": CHAT}, {"messages": [*CHAT, CHAT[0] | {"name": "Ann"}, CHAT[1] | {"tool_calls": [call]}]}]
    tokenizer = chat_tokenizer(TOOLS)
    expected = load(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)
    path = tmp_path / ("saved" if suffix == "saved" else f"b{suffix}")
    if suffix == ".csv":
        pandas.DataFrame([{"messages": json.dumps(row["messages"])} for row in rows]).to_csv(path, index=False)
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path.write_text(json.dumps(rows))
    if suffix == ".csv":
        assert load(str(path), words="--data_format messages", tokenizer=tokenizer).train[:] == expected.train[:]
    assert load(str(path), tokenizer=tokenizer).train[:] == expected.train[:]


def test_the_same_content_in_all_formats_gives_the_same_rows(shared: Path, tmp_path: Path) -> None:
    """Alpaca data, its rendered prompts, and conversations in a chat template that writes the Alpaca text."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny")
    # The space is the one that SentencePiece puts before a text, and not behind a special token.
    tokenizer.chat_template = (
        "{{ bos_token + ' ' }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% else %}{{ '\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
    )
    lines = (shared / "data" / "alpaca_en.train.jsonl").read_text(encoding="utf-8").splitlines()[::10]
    alpaca = [json.loads(line) for line in lines]
    split = [(TEMPLATE.prompt(row["instruction"], row["input"]), row["output"]) for row in alpaca]
    asked = [(prompt.removesuffix("\n\n### Response:\n"), answer) for prompt, answer in split]
    rows = {
        "alpaca": alpaca,
        "prompt_completion": [{"prompt": prompt, "completion": answer} for prompt, answer in split],
        "messages": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in asked
        ],
        "sharegpt": [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in asked],
    }
    encoded = {}
    for kind, content in rows.items():
        name = write(tmp_path / f"{kind}.jsonl", content)
        data = load(name, words="--add_eos_token --max_length 300", tokenizer=tokenizer, template=TEMPLATE)
        assert data.sources[0].data_format == kind
        encoded[kind] = data
    expected = encoded["alpaca"]
    assert expected.train_report.rows > 80 and expected.train_report.cut_rows > 5
    for data in encoded.values():
        assert data.train[:] == expected.train[:]
        assert data.train_report == expected.train_report


def test_a_conversation_without_a_chat_template(tmp_path: Path) -> None:
    name, plain = write(tmp_path / "a.jsonl", [{"messages": CHAT}]), chat_tokenizer(None)
    assert "no chat template" in refused(name, tokenizer=plain)
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    data = load(name, words=f"--chat_template {file}", tokenizer=plain)
    assert answers(data) == [["ok<|im_end|>"]]
    assert data.chat_template == CHATML and plain.chat_template is None  # the run's folder is given it


def test_a_chat_template_without_a_conversation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.jsonl", ALPACA), words=f"--chat_template {file}")
    assert "--chat_template has no effect" in caplog.text


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"instruction": "a", "input": "", "output": None}, "row 2: 'output' is missing"),
        ({"instruction": "a"}, "row 2: 'output' is missing"),
        ({"instruction": 5, "output": "b"}, "row 2: 'instruction' is 5, not text"),
        ({"instruction": "a", "input": 3.5, "output": "b"}, "row 2: 'input' is 3.5, not text"),
        ({"instruction": "a", "output": "x\ud800"}, "row 2: 'output' holds \\ud800, half of a character"),
        ({"instruction": {"a": [1]}, "output": "b"}, "row 2: 'instruction' is {'a': [1]}, not text"),
    ],
)
def test_bad_rows_are_named(row: dict, part: str, tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [ALPACA[0], row, ALPACA[1]])
    assert refused(name).startswith(f"{name}, {part}")


def test_bad_messages_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", [{"messages": CHAT}])
    bad = write(folder / "b.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], {"role": "x", "content": ""}]}])
    assert refused(str(folder)).startswith(f"{bad}, row 2, message 2: unknown role 'x'")
    bad = write(folder / "b.jsonl", [{"prompt": "x", "completion": CHAT}])
    assert "must be both texts or both lists" in refused(bad)


def test_rows_of_excluded_sources(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row | {"data_source": source} for row, source in zip(ALPACA, ["MATH", "airoboros", None], strict=False)]
    with caplog.at_level(logging.WARNING):
        data = load(write(tmp_path / "a.jsonl", rows))
    assert len(data.train) == 2 and data.sources[0].left_out == 1 and "1 rows left out" in caplog.text
    assert "holds no rows" in refused(write(tmp_path / "b.jsonl", rows[1:2]))


def test_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": CHAT, "data_source": None}, {"messages": [*CHAT, CHAT[0] | {"name": "x"}]}]
    monkeypatch.setattr(records, "load_dataset", lambda name, split: Dataset.from_list(rows))
    assert answers(load("owner/data")) == [["ok<|im_end|>"]] * 2
    rows[1]["messages"] = [CHAT[0]]
    assert refused("owner/data").startswith("owner/data, row 2: no message of the assistant")


def test_an_endless_line_of_a_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_LINE_BYTES", 2**20)
    path = tmp_path / "a.csv"
    with open(path, "wb") as file:
        file.write(b"instruction,output\na,b\n" + b'c,"')
        file.truncate(2**28)  # zeros, which take no disk
    tracemalloc.start()
    try:
        assert f"{path}, line 3: longer than 1 MiB" in refused(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    rows = [{"instruction": "a", "output": "b\nc" * 50_000}] * 4
    pandas.DataFrame(rows).to_csv(path, index=False)
    assert load(str(path), words="--max_length 8").train_report.cut_rows == 4


# ---- long rows -------------------------------------------------------------------------------------------------------


def test_long_rows_are_cut_or_dropped(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "b" * 5},
        {"instruction": "a", "output": "b" * 50},  # cut in its answer
        {"instruction": "a" * 50, "output": "b"},  # its answer is beyond the end
        {"instruction": "a", "output": ""},
    ]
    name = write(tmp_path / "a.jsonl", rows)
    report = load(name, words="--max_length 20").train_report
    assert (report.rows, report.cut_rows, report.cut_ends, report.dropped_rows) == (2, 1, 1, 2)
    assert report.dropped_long_rows == 0 and report.tokens == 8 + 20
    report = load(name, words="--max_length 20 --long_rows drop").train_report
    assert (report.rows, report.cut_rows, report.dropped_rows, report.dropped_long_rows) == (1, 0, 1, 2)
    message = refused(write(tmp_path / "b.jsonl", rows[1:3]), words="--max_length 20 --long_rows drop")
    assert "every one of 2 rows is longer than --max_length 20" in message
    assert "no token to learn" in refused(write(tmp_path / "b.jsonl", rows[2:]), words="--max_length 20")


def test_a_row_cut_after_its_last_answer_keeps_its_end(tmp_path: Path) -> None:
    chat = [*CHAT, {"role": "user", "content": "x" * 100}]
    report = load(write(tmp_path / "a.jsonl", [{"messages": chat}]), words="--max_length 60").train_report
    assert (report.cut_rows, report.cut_ends) == (1, 0)


# ---- several data sets -----------------------------------------------------------------------------------------------


def test_data_sets_follow_one_another(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ALPACA[:3]), write(tmp_path / "b.jsonl", [{"messages": CHAT}] * 2)
    data = load(first, second)
    assert answers(data) == [["ok 0"], ["ok 1"], ["ok 2"], ["ok<|im_end|>"], ["ok<|im_end|>"]]
    assert data.train_report.rows == 5
    assert [(s.data_format, s.rows, s.used) for s in data.sources] == [("alpaca", 3, 3), ("messages", 2, 2)]


def test_what_was_read_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    folder = tmp_path / "several"
    folder.mkdir()
    write(folder / "a.jsonl", rows * 3)
    (folder / "b.csv").write_text("prompt,completion\nc,d\n")
    single = write(tmp_path / "c.jsonl", rows)
    with caplog.at_level(logging.INFO, logger="tokentune"):
        load(str(folder), single)
    assert f"--dataset_name_or_path {folder}: 4 rows of 2 files ('a.jsonl', 'b.csv') read; prompt_com" in caplog.text
    assert f"--dataset_name_or_path {single}: 1 rows read; prompt_completion, 1 rows, " in caplog.text


def test_weights_say_how_often_each_comes(tmp_path: Path) -> None:
    names = [
        write(tmp_path / "a.jsonl", ALPACA[:30]),
        write(tmp_path / "b.jsonl", [{"text": f"x{n}"} for n in range(4)]),
    ]
    words = "--dataset_weights 3 1"
    data = load(*names, words=words)
    assert [source.used for source in data.sources] == [30, 10]
    texts = [text for (text,) in answers(data)]
    assert texts[:30] == [f"ok {n}" for n in range(30)]
    counts = [texts.count(f"x{n}") for n in range(4)]
    assert sorted(counts) == [2, 2, 3, 3]
    assert data.train[:] == load(*names, words=words).train[:]
    others = [load(*names, words=f"{words} --seed {seed}").train[:] for seed in range(5)]
    assert any(other != data.train[:] for other in others)
    assert data.train_report.rows == 40
    assert data.train_report.tokens == sum(map(len, data.train["input_ids"]))
    assert data.train_report.supervised_tokens == sum(label != -100 for row in data.train["labels"] for label in row)
    assert [source.used for source in load(*names, words="--dataset_weights 0 1").sources] == [0, 4]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [([10, 10], [1, 1], [10, 10]), ([100, 10], [0.7, 0.3], [100, 43]), ([5, 7, 0], [0.0, 2.0, 0.0], [0, 7, 0])],
)
def test_mixtures(sizes: list[int], weights: list[float], expected: list[int]) -> None:
    assert mixture_counts(sizes, weights) == expected
    rows = mixture_rows(sizes, expected, seed=0)
    assert len(rows) == sum(expected) and rows.max() < sum(sizes)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--dataset_weights 1", "1 weights for 2 data sets"),
        ("--dataset_weights 1 -1", "must be 0 or more"),
        ("--dataset_weights 0 0", "all are 0"),
        ("--dataset_weights 1 nan", "must be 0 or more"),
        ("--dataset_weights 1 inf", "must be 0 or more"),
        ("--eval_fraction 0", "between 0 and 1"),
        ("--eval_fraction 1", "between 0 and 1"),
        ("--eval_fraction nan", "between 0 and 1"),
        ("--eval_fraction 0.1 --eval_dataset_name_or_path x", "both say what to evaluate on"),
        ("--streaming --max_steps 5 --packing", "--streaming with --packing"),
        ("--streaming --max_steps 5 --eval_fraction 0.1", "--streaming with --eval_fraction"),
        ("--streaming", "--max_steps"),
        ("--data_format json", "--data_format"),
    ],
)
def test_flags_that_cannot_work(words: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        arguments("a", "b", words=words)


# ---- training and validation -----------------------------------------------------------------------------------------


def test_the_split_is_told_by_content(tmp_path: Path) -> None:
    words = "--eval_fraction 0.3"
    once = load(write(tmp_path / "a.jsonl", ALPACA), words=words)
    assert len(once.train) + len(once.validation) == 40 and 4 <= len(once.validation) <= 20
    assert once.validation_report.rows == len(once.validation)
    held = {tuple(ids) for ids in once.validation["input_ids"]}
    assert held.isdisjoint(tuple(ids) for ids in once.train["input_ids"])

    # In another order, with duplicates, other columns, other rows, another seed and in several files.
    rows = [row | {"id": n} for n, row in enumerate(ALPACA[::-1] + ALPACA[:20])]
    more = [{"instruction": f"other {n}", "output": "x"} for n in range(50)]
    names = write(tmp_path / "b.jsonl", rows), write(tmp_path / "c.jsonl", more)
    again = load(*names, words=f"{words} --seed 5")
    assert held <= {tuple(ids) for ids in again.validation["input_ids"]}
    assert held.isdisjoint(tuple(ids) for ids in again.train["input_ids"])
    assert len(again.train) + len(again.validation) == 110


def test_the_share_that_is_held_out() -> None:
    counts = [sum(held_out(Answer("q", str(n)), fraction) for n in range(2000)) for fraction in (0.05, 0.5, 0.95)]
    assert 60 < counts[0] < 145 and 920 < counts[1] < 1080 and 1855 < counts[2] < 1940


def test_no_side_is_empty(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", ALPACA[:1] * 4)
    assert "leaves none for validation: raise it" in refused(name, words="--eval_fraction 0.000001")
    assert "leaves none for training: lower it" in refused(name, words="--eval_fraction 0.999999")


def test_a_run_on_conversations(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Two data sets with weights, a template from a file, a part held out."""
    chats = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"ok {n}"}] for n in range(24)]
    names = write(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats]), write(tmp_path / "b.jsonl", ALPACA[:8])
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML)
    words = f"--dataset_weights 3 1 --chat_template {file} --eval_fraction 0.25 --max_length 64 --global_batch_size 8"
    words += " --warmup_steps 0 --learning_rate 1e-3 --report_to none --lora --tokentune --prefix_length 0.5"
    words += f" --skip_verification --skip_memory_probe --logging_steps 1 --model_save_path {tmp_path / 'models'}"
    main(["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", *names, *words.split()])
    (folder,) = (tmp_path / "models").iterdir()
    assert folder.name == "tiny-llama-a+b-lora-tokentune-0.5"
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    summary = json.loads((folder / "training_summary.json").read_text())
    counts = summary["data"]
    assert counts["train"]["rows"] >= 32 - counts["validation"]["rows"] > 0 < counts["validation"]["rows"]
    assert summary["validation_loss"]["final"] < summary["validation_loss"]["base"]


def test_validation_data_of_its_own(tmp_path: Path) -> None:
    held = write(tmp_path / "b.jsonl", [{"messages": CHAT}])
    data = load(write(tmp_path / "a.jsonl", ALPACA), words=f"--eval_dataset_name_or_path {held}")
    assert len(data.train) == 40 and len(data.validation) == data.validation_report.rows == 1
    assert [source.flag for source in data.sources] == ["--dataset_name_or_path", "--eval_dataset_name_or_path"]
    nothing = write(tmp_path / "c.jsonl", [{"text": ""}])
    assert "no token to learn" in refused(
        write(tmp_path / "a.jsonl", ALPACA), words=f"--eval_dataset_name_or_path {nothing}"
    )
