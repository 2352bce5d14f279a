"""Tokens of earlier runs are used again, and never where anything that they depend on has changed."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CHATML, chat_tokenizer
from datasets import Dataset
from instruction_rows import ALPACA, PLAIN, write

from tokentune.cli.arguments import parse_arguments
from tokentune.data import instruction_data, prompts, token_cache
from tokentune.data.instruction_data import InstructionData, load_instruction_data
from tokentune.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]


@pytest.fixture
def name(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], CHAT[0], CHAT[1]]}])


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each data set that was really encoded."""
    done: list[str] = []
    real = instruction_data._Loader._encode

    def encode(self: Any, source: Any, *args: Any) -> Any:
        done.append(source.name)
        return real(self, source, *args)

    monkeypatch.setattr(instruction_data._Loader, "_encode", encode)
    return done


def load(
    name: str, cache: Path | str, words: str = "", tokenizer: Any = None, template: Any = PLAIN
) -> InstructionData:
    given = ["--model_name_or_path", "none", "--dataset_name_or_path", name, "--data_cache", str(cache)]
    return load_instruction_data(
        parse_arguments([*given, *words.split()]), tokenizer or chat_tokenizer(CHATML), template
    )


def test_used_again(name: str, tmp_path: Path, encodings: list, caplog: pytest.LogCaptureFixture) -> None:
    words = "--eval_fraction 0.5 --max_length 30"
    name = write(tmp_path / "b.jsonl", [*ALPACA, {"instruction": "x" * 50, "output": "y"}])
    first = load(name, tmp_path / "cache", words)
    with caplog.at_level(logging.INFO, logger="tokentune"):
        again = load(name, tmp_path / "cache", words)
    assert len(encodings) == 1 and "tokens of an earlier run are used again" in caplog.text
    assert again.train[:] == first.train[:] and again.validation[:] == first.validation[:]
    assert (again.train_report, again.validation_report) == (first.train_report, first.validation_report)
    assert again.sources == first.sources
    assert again.train.cache_files  # mapped, not read


def test_nothing_is_kept_where_none_is_asked_for(
    name: str, tmp_path: Path, encodings: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_write", lambda *_: pytest.fail("written"))
    for _ in range(2):
        load(name, "none")
    assert len(encodings) == 2


def test_the_folder_below_the_hugging_face_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert token_cache.cache_folder("auto") == tmp_path / "tokentune"
    assert token_cache.cache_folder("~/x") == Path.home() / "x"


def other_vocabulary() -> Any:
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_tokens(["Hi"])
    return tokenizer


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "max_length": lambda _: {"words": "--max_length 40"},
    "eos": lambda _: {"words": "--add_eos_token"},
    "long rows": lambda _: {"words": "--long_rows drop"},
    "format": lambda _: {"words": "--data_format messages"},
    "fraction": lambda _: {"words": "--eval_fraction 0.5"},
    "prompt template": lambda _: {"template": replace(PLAIN, prompt_no_input="{instruction}: ")},
    "chat template": lambda _: {"tokenizer": chat_tokenizer(CHATML + " ")},
    "eos token": lambda _: {"tokenizer": chat_tokenizer(CHATML, eos="<|im_end|>")},
    "post-processor": lambda _: {"tokenizer": chat_tokenizer(CHATML, adds_bos=False)},
    "vocabulary": lambda _: {"tokenizer": other_vocabulary()},
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_of_flags_and_tokenizer(what: str, tmp_path: Path, encodings: list) -> None:
    name = write(tmp_path / "a.jsonl", [{"messages": [CHAT[0] | {"content": f"Hi {n}"}, CHAT[1]]} for n in range(20)])
    load(name, tmp_path / "cache")
    load(name, tmp_path / "cache", **CHANGES[what](tmp_path))
    assert len(encodings) == 2
    load(name, tmp_path / "cache", **CHANGES[what](tmp_path))
    load(name, tmp_path / "cache")
    assert len(encodings) == 2


def test_changes_of_the_file(name: str, tmp_path: Path, encodings: list) -> None:
    load(name, tmp_path / "cache")
    file, text = Path(name), Path(name).read_text()
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text(text.replace("ok", "no"))  # as long, and as old
    os.utime(file, ns=times)
    changed = load(name, tmp_path / "cache")
    assert len(encodings) == 2
    file.write_text(text)
    assert load(name, tmp_path / "cache").train[:] != changed.train[:]
    copy = tmp_path / "copy.jsonl"
    copy.write_text(text)
    load(str(copy), tmp_path / "cache")  # the same content under another name
    assert len(encodings) == 2


def test_a_dry_run_writes_nothing_and_uses_what_there_is(name: str, tmp_path: Path, encodings: list) -> None:
    load(name, tmp_path / "cache", "--dry_run")
    assert len(encodings) == 1 and not (tmp_path / "cache").exists()
    load(name, tmp_path / "cache")
    load(name, tmp_path / "cache", "--dry_run")
    assert len(encodings) == 2


@pytest.mark.parametrize("what", ["code", "versions", "day"])
def test_changes_of_code_libraries_and_day(
    what: str, name: str, tmp_path: Path, encodings: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{% if strftime_now('%Y') == 'x' %}{% endif %}" + CHATML
    for template in (CHATML, dated):
        load(name, tmp_path / "cache", tokenizer=chat_tokenizer(template))
    if what == "code":
        monkeypatch.setattr(token_cache, "CODE", token_cache.CODE[1:])
    elif what == "versions":
        monkeypatch.setattr(token_cache, "version", lambda _: "0.0")
    else:
        monkeypatch.setattr(token_cache, "today", lambda: "2000-01-01")
    for template in (CHATML, dated):
        load(name, tmp_path / "cache", tokenizer=chat_tokenizer(template))
    assert len(encodings) == (3 if what == "day" else 4)


def test_the_code_s_hash_reads_the_modules_that_decide() -> None:
    """All that turns a file into tokens, wherever another file of the same name may stand."""
    from tokentune.data import encoding, instruction_data
    from tokentune.data.chat import rendering as chat_rendering
    from tokentune.data.chat import spans as chat_spans
    from tokentune.data.formats import conversations, record_files, records

    modules = (chat_rendering, chat_spans, conversations, encoding, instruction_data, record_files, records, prompts)
    assert {Path(module.__file__) for module in modules} <= set(token_cache.CODE)
    assert all(file.is_file() for file in token_cache.CODE)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no facts", "bad facts", "missing"])
def test_a_broken_entry_is_made_again(
    damage: str, name: str, tmp_path: Path, encodings: list, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(name, tmp_path / "cache").train[:]
    (entry,) = (tmp_path / "cache").iterdir()
    table = entry / "train.arrow"
    content = bytearray(table.read_bytes())
    if damage == "truncated":
        table.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        table.write_bytes(content)
    elif damage == "missing":
        table.unlink()
    else:
        (entry / "entry.json").write_text("" if damage == "no facts" else json.dumps({"sha256": []}))
    again = load(name, tmp_path / "cache")
    assert len(encodings) == 2 and "are broken" in caplog.text
    assert again.train[:] == first
    load(name, tmp_path / "cache")
    assert len(encodings) == 2  # whole again
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


def test_a_folder_that_cannot_be_written_only_warns(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(name, "none").train[:]
    (tmp_path / "file").write_text("")
    assert load(name, tmp_path / "file" / "cache").train[:] == expected
    assert "cannot keep tokens there: Not a directory" in caplog.text
    assert (tmp_path / "file").read_text() == ""

    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(instruction_data.TableOfRows, "finish", lambda self: full(self) if self.file else real(self))
    assert load(name, tmp_path / "cache").train[:] == expected
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


real = instruction_data.TableOfRows.finish


def test_bad_data_leaves_nothing_behind(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [ALPACA[0], {"instruction": "x", "output": 5}])
    with pytest.raises(UserError, match="row 2"):
        load(name, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_entries_that_a_killed_run_left_are_removed(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for age, left in ((0, "k.part-new"), (2 * 24 * 3600, "k.part-old")):
        (cache / left).mkdir(parents=True)
        stamp = (cache / left).stat().st_mtime - age
        os.utime(cache / left, (stamp, stamp))
    load(name, cache)
    assert {path.name for path in cache.iterdir() if "part" in path.name} == {"k.part-new"}


def test_another_process_that_was_faster(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry, which it may have mapped already, stays."""
    build = instruction_data._Loader._encode
    inodes = []

    def encode(self: Any, *args: Any) -> Any:
        if not inodes:
            inodes.append(0)
            load(name, tmp_path / "cache")
            (entry,) = (path for path in (tmp_path / "cache").iterdir() if "part" not in path.name)
            inodes.append((entry / "train.arrow").stat().st_ino)
        return build(self, *args)

    monkeypatch.setattr(instruction_data._Loader, "_encode", encode)
    data = load(name, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    assert (entry / "train.arrow").stat().st_ino == inodes[1]
    assert len(data.train) == 2


def test_changes_of_a_saved_data_set(tmp_path: Path, encodings: list) -> None:
    for text in ("ab", "ab", "cd"):
        table = Dataset.from_list([{"text": text}])
        table._fingerprint = "always the same"
        table.save_to_disk(tmp_path / "saved")
        assert (
            chat_tokenizer(None).decode(load(str(tmp_path / "saved"), tmp_path / "cache").train[0]["input_ids"][1:])
            == text
        )
    assert len(encodings) == 2
