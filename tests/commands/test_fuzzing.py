"""Input that nobody would write: learnt from or refused in a sentence; never a traceback, never trained on nothing.

Each property draws the same examples in every run. A message has at most three lines and is not the input itself.
"""

import json
import multiprocessing
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokentune.cli.arguments import parse_arguments
from tokentune.data.formats.json_files import read_json_lines
from tokentune.data.inspection.checks import check_data
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.errors import UserError
from tokentune.models.pretrained import load_tokenizer
from tokentune.settings.finetune import FinetuneArguments

VOCABULARY = 400
MOST_CHARACTERS = 1500  # of a message
fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "120")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ODD = ["", " ", "\x00", "\ud800", "\ufeff", "\u2028", "</s>", "<s>", "{instruction}", "{{ 7 * 7 }}", "{% x %}", "%s"]
ODD += ["### Response:\n", "\r\n", "é" * 300, "🙂", "\u202e", "a\tb", "nan", "null", "0", "\\", '"', "a" * 3000]
texts = st.one_of(st.text(max_size=20), st.sampled_from(ODD))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def outcome(run: Callable[[], object]) -> object | None:
    """What the call returns; None where it is refused, in few words."""
    try:
        return run()
    except UserError as refused:
        message = str(refused)
        assert message.strip()
        assert len(message.splitlines()) <= 3, message
        assert len(message) <= MOST_CHARACTERS, message
        message.encode("utf-8", errors="surrogatepass")
        return None


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path):
    found = load_tokenizer(str(tiny_llama_dir))
    ensure_pad_token(found, VOCABULARY)
    return found


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_llama_dir: Path):
    """One with a chat template, so that conversations get as far as tokens."""
    found = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ensure_pad_token(found, VOCABULARY)
    found.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def learn(path: Path, tokenizer: object, *words: str) -> object | None:
    """Reads, encodes and checks a file as finetune.py does. Returns the rows; None where they are refused."""

    def run() -> object:
        names = ["--model_name_or_path", "m", "--dataset_name_or_path", str(path), "--data_cache", "none"]
        arguments: FinetuneArguments = parse_arguments([*names, "--max_length", "200", "--tokentune", *words])
        template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
        data = load_instruction_data(arguments, tokenizer, template)
        check_data(data, tokenizer, arguments, VOCABULARY)
        return data

    data = outcome(run)
    if data is not None:
        supervised = [sum(label != -100 for label in row["labels"]) for row in data.train]
        assert supervised and all(supervised)
        assert sum(supervised) == data.train_report.supervised_tokens
        assert all(len(row["input_ids"]) == len(row["labels"]) <= 200 for row in data.train)
    return data


# ---- records ---------------------------------------------------------------------------------------------------------

COLUMNS = ["instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text", "data_source"]
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "narrator"])
turns = st.one_of(
    st.fixed_dictionaries({"role": ROLES | values, "content": texts | values}),
    st.fixed_dictionaries({"from": ROLES | values, "value": texts | values}),
    values,
)
cells = st.one_of(texts, values, st.lists(turns, max_size=4))
records = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS) | texts, cells, max_size=5) | values, min_size=1, max_size=4
)
formats = st.sampled_from(["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"])


def written(path: Path, rows: list) -> Path:
    lines = rows if path.suffix == ".jsonl" else [rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@fuzzed
@given(rows=records, data_format=formats, suffix=st.sampled_from([".jsonl", ".json"]), packing=st.booleans())
@example(rows=[{"instruction": "\ud800", "output": "\udfff"}], data_format="auto", suffix=".jsonl", packing=False)
@example(rows=[{"instruction": "x", "output": ""}], data_format="auto", suffix=".jsonl", packing=False)
@example(rows=[{"text": "\x00"}], data_format="auto", suffix=".json", packing=True)
@example(rows=[{"messages": []}], data_format="auto", suffix=".jsonl", packing=False)
@example(rows=[{"messages": [{"role": "user", "content": "x"}]}], data_format="auto", suffix=".jsonl", packing=False)
def test_records_of_any_shape(rows, data_format, suffix, packing, folder: Path, chat_tokenizer) -> None:
    path = written(folder / f"rows{suffix}", rows)
    learn(path, chat_tokenizer, "--data_format", data_format, *(["--packing"] if packing else []))


good_turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), texts).map(
        lambda turn: {"role": turn[0], "content": turn[1]}
    ),
    max_size=5,
)
shapes = st.one_of(
    st.fixed_dictionaries({"instruction": texts, "input": texts | st.none(), "output": texts}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts}),
    st.fixed_dictionaries({"messages": good_turns}),
    st.fixed_dictionaries({"text": texts}),
)


@fuzzed
@given(rows=st.integers(0, 3).flatmap(lambda n: st.lists(shapes, min_size=1, max_size=n + 1)), eos=st.booleans())
def test_records_of_the_right_shape(rows, eos, folder: Path, chat_tokenizer) -> None:
    learn(written(folder / "right.jsonl", rows), chat_tokenizer, *(["--add_eos_token"] if eos else []))


@fuzzed
@given(
    content=st.one_of(
        st.binary(max_size=80),
        st.text(max_size=80).map(str.encode),
        st.lists(
            st.sampled_from([b'{"text": "a"}', b"{", b"}", b"[", b"]", b'"', b",", b"\n", b"\xff", b"NaN", b"1e9"])
        ).map(b"".join),
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]),
)
@example(content=b"[" * 100_000, suffix=".json")
@example(content=b'{"text": ' * 50_000, suffix=".jsonl")
@example(content=b'{"text": ' + b"9" * 10_000 + b"}", suffix=".jsonl")
@example(content=b"PAR1" + b"\x00" * 20 + b"PAR1", suffix=".parquet")
@example(content=b'instruction,output\n"a,b\n', suffix=".csv")
def test_files_of_any_content(content: bytes, suffix: str, folder: Path, tokenizer) -> None:
    path = folder / f"content{suffix}"
    path.write_bytes(content)
    learn(path, tokenizer)


def rows_in_little_memory(path: Path) -> list[str]:
    """What reading a file says, in a process that may not grow by more than a quarter of a gigabyte."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
    said = []
    try:
        said += map(str, read_json_lines(path))
    except UserError as refused:
        said.append(str(refused))
    return said


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is told by /proc, of Linux")
def test_a_line_of_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    """The file has a hole and takes no room on the disk."""
    path = tmp_path / "line.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(2**30)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        row, message = pool.apply(rows_in_little_memory, (path,))
        with pytest.raises(MemoryError):  # the limit is one
            pool.apply(path.read_bytes)
    assert row == "{'text': 'a'}"
    assert message.startswith(f"{path}, line 2: longer than 64 MiB.")


# ---- templates -------------------------------------------------------------------------------------------------------

places = st.lists(st.sampled_from(["{instruction}", "{input}", "{", "}", "{}", "{0}", "Response:", "\n", "%s"]) | texts)
prompts = places.map("".join)
KEYS = ["prompt_input", "prompt_no_input", "response_split"]


@fuzzed
@given(content=values | st.fixed_dictionaries(dict.fromkeys(KEYS, prompts | values)))
@example(content={"prompt_input": "{instruction}{input}", "prompt_no_input": "{instruction}", "response_split": ""})
def test_prompt_templates(content, folder: Path, tokenizer) -> None:
    rows = [{"instruction": "Say {input}.", "input": "{instruction}", "output": "Yes."}]
    (folder / "t.json").write_text(json.dumps(content), encoding="utf-8")
    learn(written(folder / "t.jsonl", rows), tokenizer, "--prompt_template_name_or_path", str(folder / "t.json"))


PIECES = """
{% for m in messages %}  {% endfor %}  {{ m["role"] }}  {{ m.content }}  {{ messages[0]["content"] }}  {% generation %}
{% endgeneration %}  {% if m.role == "assistant" %}  {% else %}  {% endif %}  {{ bos_token }}  {{ eos_token }}  [x]
{% if add_generation_prompt %}[assistant]{% endif %}  {{ messages[9].content }}  {{ 1 / 0 }}  {{ raise_exception(1) }}
{{ none.x.y }}  {{ m.content.x.y }}  {{ range(10 ** 9) | list }}  {{ messages | length }}  {{ tools }}  {{ "%s" % 1 }}
{{ "a" | int + [] }}  {{ strftime_now("%Y") }}  {# remark #}  {{  %}  {% break %}  {{ messages | tojson }}  {{ m }}
{{ messages.pop() }}  {{ m.content | upper }}  {{ m.content | trim }}  {% macro f() %}{{ f() }}{% endmacro %}  {{ f() }}
{% set messages = [] %}  {{ m.content[::-1] }}  {{ "".join(messages) }}  {{ lipsum() }}
"""
PIECES = re.split(r"  |\n", PIECES.strip())
loops = st.lists(st.sampled_from(PIECES), max_size=5).map(
    lambda pieces: "{% for m in messages %}" + "".join(pieces) + "{% endfor %}"
)
templates = st.one_of(loops, st.lists(st.sampled_from(PIECES) | texts, max_size=8).map("".join))


@fuzzed
@given(template=templates, marked=st.booleans())
@example(template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ messages }}", marked=False)
@example(template="{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", marked=False)
@example(template="{% for m in messages %}{{ m.content | upper }}{% endfor %}", marked=True)
@example(template="{{ 'a' * 10 ** 14 }}{{ messages }}", marked=False)
def test_chat_templates(template: str, marked: bool, folder: Path, tiny_llama_dir: Path) -> None:
    found = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ensure_pad_token(found, VOCABULARY)
    chat = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day {{ m }}."}]
    path = written(folder / "chats.jsonl", [{"messages": chat * 2}])
    if marked:  # the tokenizer's own, which nobody has looked at before
        found.chat_template = template
        learn(path, found)
        return
    (folder / "t.jinja").write_text(template, encoding="utf-8", errors="surrogatepass")
    learn(path, found, "--chat_template", str(folder / "t.jinja"))


# ---- the command line ------------------------------------------------------------------------------------------------

FLAGS = [*parse_arguments(["--model_name_or_path", "m", "--dataset_name_or_path", "d"]).settings()]
YAML = [
    ": ",
    "- ",
    "\n",
    "  ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!python/object:os.x ",
    "!!int ",
    "|\n",
    "'",
    '"',
    "#",
]
YAML += ["true", "null", "1", "1e3", ".nan", "010", "1:30", "2020-01-01", "<<: ", "? ", "%YAML 9.9\n", "---\n", "...\n"]
lines = st.tuples(st.sampled_from(FLAGS) | texts, st.sampled_from(YAML) | texts | scalars.map(json.dumps))
yaml_texts = st.one_of(
    st.lists(lines.map(lambda line: f"{line[0]}: {line[1]}\n"), max_size=5).map("".join),
    st.lists(st.sampled_from(YAML + FLAGS) | texts, max_size=12).map("".join),
)
NAMES = ["--model_name_or_path", "m", "--dataset_name_or_path", "d"]


@fuzzed
@given(text=yaml_texts)
@example(text="lora: " + "[" * 5000)
@example(text="a: &a [*a]\nlora: *a\n")
@example(text="&a a: *a\n")
@example(text="".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" if n else "x0: &x0 a\n" for n in range(30)))
@example(text="lora_r: " + "9" * 10_000)
@example(text="learning_rate: 1e999")
@example(text="global_batch_size: 0b_")
def test_config_files(text: str, folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    outcome(lambda: parse_arguments(["--config", str(path), *NAMES]))


@fuzzed
@given(text=st.text(max_size=12) | st.floats().map(str) | st.integers().map(str) | st.sampled_from(ODD[:20]))
@example(text="9" * 500)
@example(text="1_0")
@example(text="١٦")
@example(text="0x10")
@example(text="-0.0")
def test_prefix_lengths(text: str) -> None:
    arguments = outcome(lambda: parse_arguments([*NAMES, "--tokentune", f"--prefix_length={text}"]))
    if arguments is not None:
        selected = arguments.selection.selected
        assert (isinstance(selected, int) and selected >= 1) or 0 < selected <= 1


@fuzzed
@given(flag=st.sampled_from(FLAGS), value=scalars.filter(lambda value: len(str(value)) <= 300))
def test_flags_of_any_value(flag: str, value: object) -> None:
    if flag != "offline":  # which would cut off the tests that come after
        outcome(lambda: parse_arguments([*NAMES, f"--{flag}={value}"]))
