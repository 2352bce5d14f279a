"""Data and templates that cannot be learnt from: the sentence that each ends with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import check_sentence, filled

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
CHAT = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]


def line(**changes: object) -> str:
    """A good record as a line, or with None for a column, one that lacks it."""
    return json.dumps({key: value for key, value in (GOOD | changes).items() if value is not ...}) + "\n"


def chat(*turns: object) -> str:
    return json.dumps({"messages": [*turns]}) + "\n"


ROW = line()
DATA = "--dataset_name_or_path {tmp}/"
CASES = [  # name, files, words, sentence
    (
        "no such file",
        {},
        DATA + "none.jsonl",
        "--dataset_name_or_path {tmp}/none.jsonl: no such file or folder. Check the path (now in {cwd}).",
    ),
    (
        "no such folder",
        {},
        DATA + "none/",
        "--dataset_name_or_path {tmp}/none/: no such file or folder. Check the path (now in {cwd}).",
    ),
    (
        "a file of another kind",
        {"a.txt": "x"},
        DATA + "a.txt",
        "--dataset_name_or_path {tmp}/a.txt: unknown file type; .json, .jsonl, .csv, .parquet can be read.",
    ),
    ("an empty file", {"a.jsonl": ""}, DATA + "a.jsonl", "{tmp}/a.jsonl: the file is empty."),
    ("blank lines", {"a.jsonl": "\n \n"}, DATA + "a.jsonl", "{tmp}/a.jsonl: the file is empty."),
    (
        "a malformed line",
        {"a.jsonl": ROW + ROW + "{'instruction': 'x'}\n"},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, line 3: not valid JSON: ...",
    ),
    (
        "a list for a line",
        {"a.jsonl": ROW + "[1]\n"},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, line 2: expected an object, found a JSON array.",
    ),
    (
        "Latin-1",
        {"a.jsonl": line(output="é").encode().decode("unicode_escape").encode("latin-1")},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl: not UTF-8 text (byte 56). Convert it, e.g. with iconv.",
    ),
    (
        "a number for a file",
        {"a.json": "42"},
        DATA + "a.json",
        "{tmp}/a.json: holds a JSON number; expected an array of objects.",
    ),
    (
        "numbers for rows",
        {"a.json": "[1, 2]"},
        DATA + "a.json",
        "{tmp}/a.json: 2 of 2 rows are bad: row 1: expected an object, found a JSON number; row 2: expected an object, "
        "found a JSON number.\nRepair them.",
    ),
    (
        "an array cut short",
        {"a.json": "[" + ROW.strip() + ",\n"},
        DATA + "a.json",
        "{tmp}/a.json, line 2: not valid JSON: ...",
    ),
    (
        "an empty array",
        {"a.json": "[]"},
        DATA + "a.json",
        "--dataset_name_or_path {tmp}/a.json: holds no rows to train on.",
    ),
    (
        "nested too deeply",
        {"a.json": "[" * 100000},
        DATA + "a.json",
        "{tmp}/a.json: cannot be read: nested too deeply.",
    ),
    (
        "a header alone",
        {"a.csv": "instruction,output\n"},
        DATA + "a.csv",
        "--dataset_name_or_path {tmp}/a.csv: holds no rows to train on.",
    ),
    (
        "more cells than names",
        {"a.csv": "instruction,output\na,b,c\n"},
        DATA + "a.csv",
        "{tmp}/a.csv, line 2: has 3 cells, and the header 2 names.",
    ),
    (
        "a quote without its end",
        {"a.csv": 'instruction,output\n"a,b\n'},
        DATA + "a.csv",
        "{tmp}/a.csv, line 2: not valid CSV: ...",
    ),
    ("no Parquet", {"a.parquet": "PAR1"}, DATA + "a.parquet", "{tmp}/a.parquet: not a valid Parquet file: ..."),
    (
        "a folder without data",
        {"rows/README.md": "x"},
        DATA + "rows",
        "--dataset_name_or_path {tmp}/rows: no .json, .jsonl, .csv, .parquet file in this folder.",
    ),
    (
        "a folder without this split",
        {"rows/test.jsonl": ROW},
        DATA + "rows",
        "--dataset_name_or_path {tmp}/rows: no split 'train', only test. Choose one with --dataset_split, or name a "
        "file.",
    ),
    (
        "columns of nobody",
        {"a.jsonl": '{"question": "x", "answer": "y"}\n'},
        DATA + "a.jsonl",
        "--dataset_name_or_path {tmp}/a.jsonl: its columns fit no format. It has 'question', 'answer'.\n"
        "Rename the columns that hold the texts. Formats and their columns: alpaca: 'instruction', 'output' "
        "(and 'input', if any); prompt_completion: 'prompt', 'completion'; messages: 'messages' (role, "
        "content); sharegpt: 'conversations' (from, value); text: 'text'.",
    ),
    (
        "columns of two formats",
        {"a.jsonl": line(messages=CHAT)},
        DATA + "a.jsonl",
        "--dataset_name_or_path {tmp}/a.jsonl: its columns fit several formats (alpaca, messages): name one "
        "with --data_format. It has 'instruction', 'input', 'output', 'messages'.",
    ),
    (
        "columns of another format",
        {"a.jsonl": ROW},
        DATA + "a.jsonl --data_format messages",
        "--dataset_name_or_path {tmp}/a.jsonl: no column 'messages', which --data_format messages needs. It "
        "has 'instruction', 'input', 'output'.",
    ),
    (
        "a column missing",
        {"a.jsonl": line(output=...)},
        DATA + "a.jsonl --data_format alpaca",
        "--dataset_name_or_path {tmp}/a.jsonl: no column 'output', which --data_format alpaca needs. It has "
        "'instruction', 'input'.",
    ),
    (
        "a text missing",
        {"a.jsonl": ROW + line(output=None)},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 2: 'output' is missing.",
    ),
    (
        "a number for a text",
        {"a.jsonl": ROW + line(instruction=42)},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 2: 'instruction' is 42, not text.",
    ),
    (
        "a list for a text",
        {"a.jsonl": ROW + line(input=["x"])},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 2: 'input' is ['x'], not text.",
    ),
    (
        "half a character",
        {"a.jsonl": ROW + line(output="\ud800")},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 2: 'output' holds \\ud800, half of a character (a lone surrogate), which is no text.",
    ),
    (
        "nothing to learn",
        {"a.jsonl": line(output="") * 3},
        DATA + "a.jsonl",
        "no token to learn is left in any of 3 rows: every answer is empty or context only, or lies beyond "
        "--max_length 1024. Raise it, or shorten the prompts.",
    ),
    (
        "nothing fits",
        {},
        "--max_length 4",
        "no token to learn is left in any of 16 rows: every answer is empty or context only, or lies beyond "
        "--max_length 4. Raise it, or shorten the prompts.",
    ),
    (
        "all rows dropped",
        {},
        "--max_length 4 --long_rows drop",
        "every one of 16 rows is longer than --max_length 4, and --long_rows drop leaves none. Raise it, or "
        "take --long_rows cut.",
    ),
    (
        "no conversation",
        {"a.jsonl": '{"messages": "Hello."}\n'},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1: the conversation is text that is not JSON: 'Hello.'.",
    ),
    (
        "an empty conversation",
        {"a.jsonl": chat()},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1: the conversation is empty.",
    ),
    (
        "a turn without a role",
        {"a.jsonl": chat({"content": "x"})},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1, message 1: no 'role', only 'content'.",
    ),
    (
        "a turn without a text",
        {"a.jsonl": chat({"role": "user"})},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1, message 1: 'content' is missing.",
    ),
    (
        "a number for a turn",
        {"a.jsonl": chat(*CHAT, 7)},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1, message 3: expected an object with role and content, found 7.",
    ),
    (
        "an unknown speaker",
        {"a.jsonl": '{"conversations": [{"from": "narrator", "value": "x"}]}\n'},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1, message 1: unknown speaker 'narrator'; known are system, human, user, gpt, "
        "assistant, model, chatgpt, ai, function_call, observation, tool, function_response.",
    ),
    (
        "text and turns",
        {"a.jsonl": json.dumps({"prompt": "x", "completion": CHAT}) + "\n"},
        DATA + "a.jsonl",
        "{tmp}/a.jsonl, row 1: 'prompt' and 'completion' must be both texts or both lists of messages.",
    ),
    (
        "a chat without a template",
        {"a.jsonl": chat(*CHAT)},
        DATA + "a.jsonl",
        "the data holds conversations, and this model's tokenizer has no chat template to put them into.\n"
        "Give one with --chat_template: alpaca, mistral or a Jinja file. Or give data with the columns instruction and "
        "output.",
    ),
    (
        "nobody answers",
        {"a.jsonl": chat(CHAT[0]), "t.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        DATA + "a.jsonl --chat_template {tmp}/t.jinja",
        "{tmp}/a.jsonl, row 1: no message of the assistant, so there is nothing to learn.",
    ),
    (
        "malformed validation data",
        {"e.jsonl": "{}\n"},
        "--eval_dataset_name_or_path {tmp}/e.jsonl",
        "--eval_dataset_name_or_path {tmp}/e.jsonl: its columns fit no format. It has no columns.\nRename the "
        "columns that hold the texts. Formats and their columns: alpaca: 'instruction', 'output' (and "
        "'input', if any); prompt_completion: 'prompt', 'completion'; messages: 'messages' (role, content); "
        "sharegpt: 'conversations' (from, value); text: 'text'.",
    ),
    (
        "no validation data",
        {},
        "--eval_dataset_name_or_path {tmp}/e.jsonl",
        "--eval_dataset_name_or_path {tmp}/e.jsonl: no such file or folder. Check the path (now in {cwd}).",
    ),
    (
        "too few to split",
        {"a.jsonl": ROW},
        DATA + "a.jsonl --eval_fraction 0.5",
        "--eval_fraction 0.5 of 1 rows leaves none for validation: raise it, or name data with "
        "--eval_dataset_name_or_path.",
    ),
    (
        "one of two is not there",
        {},
        "--dataset_name_or_path {data} {tmp}/b.jsonl",
        "--dataset_name_or_path {tmp}/b.jsonl: no such file or folder. Check the path (now in {cwd}).",
    ),
    (
        "a weight for nothing",
        {"a.jsonl": line(output="")},
        "--dataset_name_or_path {data} {tmp}/a.jsonl --dataset_weights 1 1",
        "--dataset_name_or_path {tmp}/a.jsonl: --dataset_weights 1.0, but no row is left to learn from.",
    ),
    (
        "a stream of nothing",
        {"a.jsonl": ""},
        DATA + "a.jsonl --streaming --max_steps 2",
        "{tmp}/a.jsonl: the file is empty.",
    ),
    (
        "a hub id, offline",
        {},
        "--dataset_name_or_path owner/name",
        "--dataset_name_or_path owner/name: no local folder of this name, not in the hub's cache, and "
        "--offline or HF_HUB_OFFLINE=1 forbids to download it. Give a local folder, or go online once.",
    ),
    (
        "a name of no hub id",
        {},
        "--dataset_name_or_path a--b..c",
        "--dataset_name_or_path a--b..c: no local folder of this name, not in the hub's cache, and --offline or "
        "HF_HUB_OFFLINE=1 forbids to download it. Give a local folder, or go online once.",
    ),
    (
        "a template that is not there",
        {},
        "--prompt_template_name_or_path {tmp}/t.json",
        "prompt template {tmp}/t.json: cannot be read: No such file or directory.",
    ),
    (
        "a template that is no JSON",
        {"t.json": "{"},
        "--prompt_template_name_or_path {tmp}/t.json",
        "prompt template {tmp}/t.json, line 1: not valid JSON: ...",
    ),
    (
        "a template of a list",
        {"t.json": "[]"},
        "--prompt_template_name_or_path {tmp}/t.json",
        "prompt template {tmp}/t.json: expected a JSON object.",
    ),
    (
        "a template without a key",
        {"t.json": '{"prompt_no_input": "{instruction}"}'},
        "--prompt_template_name_or_path {tmp}/t.json",
        "prompt template {tmp}/t.json: needs the key 'prompt_input' with a text; see alpaca_template.json.",
    ),
    (
        "a template without a place",
        {"t.json": json.dumps({"prompt_input": "{instruction}", "prompt_no_input": "x", "response_split": ""})},
        "--prompt_template_name_or_path {tmp}/t.json",
        "prompt template {tmp}/t.json: 'prompt_input' has no {input} in it.",
    ),
    (
        "a chat template that is not there",
        {},
        "--chat_template {tmp}/t.jinja",
        "--chat_template {tmp}/t.jinja: cannot be read: No such file or directory. Nor is it one of the names alpaca, "
        "chatml, gemma, llama-3, mistral, qwen.",
    ),
    (
        "a chat template whose tokens the tokenizer lacks",
        {},
        "--chat_template chatml",
        "--chat_template chatml: this tokenizer has no token <|im_start|>, <|im_end|>, so that the ends of turns would "
        "be ordinary text, at which nothing stops. Give one with --chat_template: alpaca, mistral or a Jinja file.",
    ),
    (
        "a chat template that is no Jinja",
        {"t.jinja": "{% for m in messages %}"},
        "--chat_template {tmp}/t.jinja",
        "--chat_template {tmp}/t.jinja, line 1: not valid Jinja: ...",
    ),
    (
        "a chat template that looks away",
        {"t.jinja": "Hello."},
        "--chat_template {tmp}/t.jinja",
        "--chat_template {tmp}/t.jinja: never mentions `messages`, so all conversations would look alike.",
    ),
    (
        "a chat template that refuses",
        {"a.jsonl": chat(*CHAT), "t.jinja": "{{ raise_exception('no system turn') }}{{ messages }}"},
        DATA + "a.jsonl --chat_template {tmp}/t.jinja",
        "{tmp}/a.jsonl, row 1: the chat template, line 1, does not take this conversation: no system turn",
    ),
    (
        "a chat template that hides the answer",
        {"a.jsonl": chat(*CHAT), "t.jinja": "{{ messages | length }}"},
        DATA + "a.jsonl --chat_template {tmp}/t.jinja",
        "{tmp}/a.jsonl, row 1, message 2: the chat template rewrites the conversation so that this answer "
        "cannot be told from the rest. Give a template that marks the assistant's text with {% generation %} "
        "({% endgeneration %}): --chat_template.",
    ),
]


@pytest.mark.parametrize(("name", "files", "words", "sentence"), CASES, ids=[name for name, *_ in CASES])
def test_data(
    name: str, files: dict, words: str, sentence: str, refused: Callable, alpaca_file: Path, tmp_path: Path
) -> None:
    places = {"tmp": tmp_path, "data": alpaca_file, "cwd": Path.cwd()}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    check_sentence(refused(*filled(words, **places).split(" ")), sentence, **places)
