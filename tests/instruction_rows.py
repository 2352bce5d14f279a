"""What the tests of instruction data share: rows in files, and how they are loaded, streamed and read again."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CHATML, chat_tokenizer, learnt_texts

from tokentune.cli.arguments import parse_arguments
from tokentune.data.instruction_data import InstructionData, load_instruction_data
from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tokentune.data.streaming_rows import StreamedRows
from tokentune.errors import UserError
from tokentune.settings.finetune import FinetuneArguments

TEMPLATE = PromptTemplate.load(DEFAULT_TEMPLATE)
PLAIN = PromptTemplate("{instruction}|{input}|", "{instruction}|", "|")
ALPACA = [{"instruction": f"say {n}", "input": "", "output": f"ok {n}"} for n in range(40)]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "ok"}]
TOKENIZER = chat_tokenizer(CHATML)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(*names: str, words: str = "") -> FinetuneArguments:
    given = ["--model_name_or_path", "none", "--data_cache", "none", "--dataset_name_or_path", *names]
    return parse_arguments([*given, *words.split()])


def load(*names: str, words: str = "", tokenizer: object = None, template: PromptTemplate = PLAIN) -> InstructionData:
    return load_instruction_data(arguments(*names, words=words), tokenizer or chat_tokenizer(CHATML), template)


def refused(*names: str, words: str = "", tokenizer: object = None) -> str:
    with pytest.raises(UserError) as error:
        load(*names, words=words, tokenizer=tokenizer)
    message = str(error.value)
    assert message.count("\n") < 3
    return message


def answers(data: InstructionData) -> list[list[str]]:
    tokenizer = chat_tokenizer(None)
    return [learnt_texts(tokenizer, row["input_ids"], row["labels"]) for row in data.train]


def stream(*names: str, words: str = "", batch: int = 4) -> StreamedRows:
    given = ["--model_name_or_path", "none", "--dataset_name_or_path", *names, "--streaming", "--max_steps", "9"]
    given += ["--global_batch_size", str(batch), *words.split()]
    return load_instruction_data(parse_arguments(given), TOKENIZER, PLAIN).train


def text(item: dict[str, Any]) -> str:
    return TOKENIZER.decode(item["input_ids"], skip_special_tokens=True)


def texts(rows: StreamedRows, count: int) -> list[str]:
    return [text(item) for item in islice(rows, count)]
