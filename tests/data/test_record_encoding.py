"""Many records at a time: the same rows as one by one, in order, in any number of processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from chat_tokenizers import CHATML, chat_tokenizer, without_marks
from instruction_rows import PLAIN

from tokentune.data.encoding import Notes
from tokentune.data.formats.conversations import openai_conversation
from tokentune.data.formats.data_formats import FORMATS, Answer
from tokentune.data.formats.record_files import chunks
from tokentune.data.record_encoding import (
    CHUNKS_HERE,
    RecordEncoder,
    killed_workers_told,
    ordered_map,
    worker_count,
)
from tokentune.errors import UserError
from tokentune.settings.data import DataArguments


def encoder(template: str, **options: bool) -> RecordEncoder:
    return RecordEncoder(chat_tokenizer(template), FORMATS["text"], PLAIN, DataArguments(["data"], **options))


def items() -> list:
    chats = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * (n % 4 + 1)}] for n in range(9)
    ]
    found = [(openai_conversation(chat, None, "x"), f"row {n}") for n, chat in enumerate(chats)]
    found[3] = (Answer("prompt ", "answer"), "row 3")
    found[7] = (Answer("", "text"), "row 7")
    return found


def test_a_batch_is_its_rows() -> None:
    encode = encoder(without_marks(CHATML), add_eos_token=True).encode
    assert encode(items(), Notes()) == [row for item in items() for row in encode([item], Notes())]


def test_a_bad_row_of_a_batch_is_told_at_its_place() -> None:
    template = "{% if messages[0].content == 'q4' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    rows = encoder(template).encode(items(), Notes())
    assert [n for n, row in enumerate(rows) if isinstance(row, UserError)] == [4]
    assert str(rows[4]) == "row 4: the chat template, line 1, does not take this conversation: not this"


def test_notes_are_taken_once() -> None:
    template = "{% for m in messages if m.role != 'tool' %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    encode, notes = encoder(template).encode, [Notes(), Notes()]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "r"}]
    for found in notes:
        encode([(openai_conversation(chat, None, "row 5"), "row 5")] * 3, found)
        ((_, (_, where, times)),) = found.found.items()
        assert (where, times) == ("row 5, message 3", 3)


def numbers(taken: list[int]) -> Iterator[int]:
    for number in range(200):
        taken.append(number)
        yield number


@pytest.mark.parametrize("workers", [1, 3])
def test_a_map_in_order(workers: int) -> None:
    found = list(ordered_map(lambda number: (number * 2, os.getpid()), numbers([]), workers))
    assert [number for number, _ in found] == [2 * number for number in range(200)]
    processes = [process for _, process in found]
    assert set(processes[:CHUNKS_HERE]) == {os.getpid()}
    assert (os.getpid() in processes[CHUNKS_HERE:]) == (workers == 1)


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []
    found = ordered_map(abs, numbers(taken), 2)
    for _ in range(CHUNKS_HERE + 1):
        next(found)
    assert len(taken) < 60
    found.close()


def test_an_error_comes_at_its_item_s_turn() -> None:
    def refuse(number: int) -> int:
        if number == 150:
            raise UserError("number 150 is bad")
        return number

    found, done = ordered_map(refuse, numbers([]), 2), []
    with pytest.raises(UserError, match="number 150"):
        done.extend(iter(found.__next__, None))
    assert done == list(range(150))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed_is_told(number: int) -> None:
    def function(item: int) -> int:
        if item == CHUNKS_HERE + 3:
            os.kill(os.getpid(), number)
            time.sleep(60)
        return item

    with pytest.raises(UserError, match="--tokenize_workers: a process that tokenizes was killed"):
        list(ordered_map(function, range(CHUNKS_HERE + 100), 2))


def test_a_process_that_is_killed_while_outcomes_are_used() -> None:
    def function(item: int) -> int:
        if item == CHUNKS_HERE + 3:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(UserError, match="a process that tokenizes was killed"), killed_workers_told():
        for item in ordered_map(function, range(CHUNKS_HERE + 100), 2):
            if item == CHUNKS_HERE:
                time.sleep(20)


def test_the_seeds_of_processes_are_not_drawn_from_this_one_s_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(ordered_map(abs, range(CHUNKS_HERE + 10), 2))
    assert torch.equal(torch.rand(3), expected)


def test_a_process_that_is_killed_within_its_result_is_told() -> None:
    watching = threading.Event()

    def die_when_the_length_is_written() -> None:
        process = psutil.Process()
        begun = process.io_counters().write_chars
        watching.set()
        while process.io_counters().write_chars == begun:
            pass
        process.kill()

    def function(item: int) -> bytes:
        if item != CHUNKS_HERE + 3:
            return b""
        threading.Thread(target=die_when_the_length_is_written, daemon=True).start()
        watching.wait()
        return bytes(2**26)

    found = ordered_map(function, range(CHUNKS_HERE + 100), 2)
    with pytest.raises(UserError, match="a process that tokenizes was killed"):
        for _ in found:
            pass


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    def function(item: int) -> int:
        if item >= CHUNKS_HERE:
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.2)
        return item

    def start() -> None:
        for item in ordered_map(function, range(1000), 2):
            if item == CHUNKS_HERE + 4:
                os.kill(os.getpid(), signal.SIGKILL)

    starter = multiprocessing.get_context("fork").Process(target=start)
    starter.start()
    starter.join(30)
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert starter.exitcode == -signal.SIGKILL and processes
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(process) and psutil.Process(process).status() != "zombie" for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_chunks_and_workers() -> None:
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []
    assert worker_count(3) == 3 and 1 <= worker_count(None) <= 8
