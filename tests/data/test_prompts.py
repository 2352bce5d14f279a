"""Templates, the boundary between prompt and answer, and whole data sets to tokens."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_rows import load, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from tokentune.data.formats.records import load_records
from tokentune.data.prompts import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    _first_token_beyond,
    encode_answers,
    ensure_pad_token,
)
from tokentune.errors import UserError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PYTHON_TOKENIZER = ByT5Tokenizer(extra_ids=0)
TEMPLATE = PromptTemplate("Q {instruction} {input} A:", "Q {instruction} A:", "A:")


def encode_example(
    prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool = False
) -> dict[str, list[int]]:
    (row,) = encode_answers([(prompt, answer)], tokenizer, add_eos_token=add_eos_token)
    return {"input_ids": row.ids, "labels": row.labels}


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2's kind: tokens of bytes, and merges of ":" with what follows, so that ":Y" is one token. Adds a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(":", "Y"), (":", "Ċ"), ("Ċ", "Ċ"), ("Ġ", "Y"), ("ð", "Ł"), ("a", "b")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's kind: SentencePiece BPE, byte fallback, no normalization; ":Y" is frequent enough to be one piece."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab a:Yes b:Yes a:Yes:Yes ab ba"] * 50),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        split_by_unicode_script=False,  # ":" may stand in a piece with letters
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **SPECIAL}))
    return folder / "tokenizer.model"


class Shouting(ByT5Tokenizer):
    """Gives another text back than it was given."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return super().convert_tokens_to_string(tokens).upper()


@pytest.fixture(scope="session", params=["byte-level", "llama", "llama without offsets"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_file: Path) -> PreTrainedTokenizerBase:
    if request.param == "byte-level":
        return byte_level_bpe()
    if request.param == "llama":
        return LlamaTokenizer.from_pretrained(sentencepiece_file.parent)
    slow = SentencePieceBackend(vocab_file=str(sentencepiece_file), legacy=True, **SPECIAL)
    assert not slow.is_fast
    return slow


def check_boundary(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[str], list[str]]:
    """Supervised must be exactly the tokens that hold a byte of the answer; returns prompt's and answer's tokens."""
    example = encode_example(prompt, answer, tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    assert ids == tokenizer(prompt + answer)["input_ids"]
    start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
    assert labels == [-100] * start + ids[start:]

    tokens = tokenizer.convert_ids_to_tokens(ids)
    letter_per_byte = "▁" not in tokenizer.get_vocab()
    sizes = [token_bytes(token, letter_per_byte) for token in tokens]
    # SentencePiece puts a space of its own before the text.
    surplus = sum(sizes) - len((prompt + answer).encode())
    assert surplus in (0, 1)
    ends = [sum(sizes[: i + 1]) - surplus for i in range(len(ids))]
    expected = next((i for i, end in enumerate(ends) if end > len(prompt.encode())), len(ids))
    assert start == max(expected, 1)
    return tokens[:start], tokens[start:]


def token_bytes(token: str, letter_per_byte: bool) -> int:
    """How many bytes of text a token stands for, from its written form."""
    if token in SPECIAL.values():
        return 0
    if letter_per_byte:  # byte-level BPE, and bytes as characters
        return len(token)
    return 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("a b", " ab"),
        ("### Response:", "Yes"),
        ("### Response:\n", "Yes"),
        ("Response:", "\n\nYes"),
        ("a:", "😀"),
        ("a:\n", "😀😀 b"),
        ("a😀", "😀b"),
        ("a 😀", "b"),
        ("a 龘é", "龘"),
        ("a\n", "�b"),  # the character that decoders show for unfinished ones, in the text itself
        ("a ", " b"),
        (" a", "b"),
        ("  ", "b"),
        ("", "ab"),
        ("ab", ""),
    ],
)
def test_boundary(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    check_boundary(tokenizer, prompt, answer)


@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab:Y \n😀é龘�", min_size=1, max_size=8), answer=st.text("ab:Y \n😀é龘�", min_size=1, max_size=8))
def test_boundary_of_any_text(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    check_boundary(tokenizer, prompt, answer)


def test_a_token_across_the_boundary_is_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    _, after = check_boundary(tokenizer, "b a:", "Yes")
    assert ":Y" in after[0]
    alone = tokenizer("b a:")["input_ids"]  # the prompt, which ends otherwise: its length would mislead
    assert alone[-1] not in encode_example("b a:", "Yes", tokenizer)["input_ids"]


def test_bytes_of_a_character_after_the_boundary_are_all_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    _, after = check_boundary(tokenizer, "a:\n", "😀")
    assert 3 <= len(after) <= 4  # byte-level: two of the four bytes are merged
    _, after = check_boundary(tokenizer, "a 😀", "b")
    assert after == ["b"]


@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab \n😀é龘�", max_size=8), answer=st.text("ab \n😀é龘�", min_size=1, max_size=8))
def test_boundary_of_a_python_tokenizer(prompt: str, answer: str) -> None:
    check_boundary(PYTHON_TOKENIZER, prompt, answer)  # its decoder leaves unfinished characters out


@pytest.mark.parametrize(
    ("tokens", "prompt", "start"),
    [
        (["b a", ":Y", "es"], "b a:", 1),
        (["b a", ":", "Yes"], "b a:", 2),
        (["b a", ":", "Yes"], "b a:Yes", 3),
        (["  b", " a", ":Y"], "  b a", 2),  # decoded without the leading spaces
    ],
)
def test_boundary_found_by_decoding(tokens: list[str], prompt: str, start: int) -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(tokens[i] for i in ids).lstrip())
    assert _first_token_beyond(prompt, "".join(tokens), list(range(len(tokens))), tokenizer) == start


def test_special_tokens_of_a_tokenizer_without_offsets(sentencepiece_file: Path) -> None:
    with_bos = SentencePieceBackend(vocab_file=str(sentencepiece_file), special_tokens_pattern="bos", **SPECIAL)
    before, after = check_boundary(with_bos, "a", " b")
    assert before[0] == "<s>"
    assert after == ["▁b"]
    _, after = check_boundary(PYTHON_TOKENIZER, "ab", "ba")
    assert after == ["b", "a", "</s>"]  # it ends every text so
    check_boundary(PYTHON_TOKENIZER, "ab", "")
    empty = encode_example("ab", "", PYTHON_TOKENIZER, add_eos_token=True)
    assert empty["labels"] == [-100, -100, PYTHON_TOKENIZER.eos_token_id]


def test_python_tokenizers_tokenize_a_text_once() -> None:
    tokenizer, seen = ByT5Tokenizer(extra_ids=0), []
    tokenize = tokenizer._tokenize
    tokenizer._tokenize = lambda text, **options: seen.append(text) or tokenize(text, **options)
    row = encode_example("Q: ", "A", tokenizer)
    assert seen == ["Q: A"] and row["input_ids"] == PYTHON_TOKENIZER("Q: A")["input_ids"]


def test_a_tokenizer_that_hides_its_text_is_refused() -> None:
    with pytest.raises(UserError, match="no character offsets"):
        encode_example("q ", "a", Shouting())


def test_real_llama_tokenizer_agrees_with_its_pieces(shared: Path) -> None:
    fast = AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny")
    slow = SentencePieceBackend(vocab_file=str(shared / "models/llama-tiny/tokenizer.model"), legacy=True, **SPECIAL)
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    lines = (shared / "data" / "alpaca_en.train.jsonl").read_text().splitlines()
    for row in map(json.loads, lines[::15]):
        prompt = template.prompt(row["instruction"], row["input"])
        before, after = check_boundary(fast, prompt, row["output"])
        pieces = check_boundary(slow, prompt, row["output"])
        assert after == pieces[1]
        assert before[-1] == "<0x0A>"


def test_no_doubled_bos() -> None:
    tokenizer = byte_level_bpe()
    example = encode_example("<s>ab", "b", tokenizer)
    assert tokenizer.convert_ids_to_tokens(example["input_ids"]) == ["<s>", "ab", "b"]
    assert example["labels"][:2] == [-100, -100]
    assert example["labels"][2] == example["input_ids"][2]


def test_eos_once_and_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    options = {"add_eos_token": True}
    for answer in ("b", "b</s>"):
        example = encode_example("a a ", answer, tokenizer, **options)
        assert example["input_ids"].count(eos) == 1
        assert example["input_ids"][-1] == example["labels"][-1] == eos
        assert example["labels"][-2] == example["input_ids"][-2]
    empty = encode_example("a a ", "", tokenizer, **options)
    assert [label for label in empty["labels"] if label != -100] == [eos]
    assert eos not in encode_example("a a ", "b", tokenizer)["input_ids"]


def test_eos_that_the_tokenizer_does_not_have() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="--add_eos_token"):
        encode_example("a", "b", tokenizer, add_eos_token=True)


@pytest.mark.parametrize("max_length", range(2, 8))
def test_the_end_is_cut(max_length: int, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()  # <s> a a | c b b </s>
    whole = encode_example("aa", "cbb", tokenizer, add_eos_token=True)
    assert len(whole["input_ids"]) == 7
    name = write(tmp_path / "a.jsonl", [{"prompt": "aa", "completion": "cbb"}, {"prompt": "", "completion": "b"}])
    cut = load(name, words=f"--add_eos_token --max_length {max_length}", tokenizer=tokenizer).train[0]
    expected = whole if max_length > 3 else encode_example("", "b", tokenizer, add_eos_token=True)
    assert cut == {key: values[:max_length] for key, values in expected.items()}


def test_the_first_label_is_masked_even_without_a_prompt() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # no BOS
    example = encode_example("", "ba", tokenizer)
    assert example["labels"] == [-100, example["input_ids"][1]]
    assert encode_example("", "", tokenizer) == {"input_ids": [], "labels": []}


def test_texts_are_put_in_literally() -> None:
    template = PromptTemplate("{instruction}|{input}|{{x}}", "{instruction}!", "")
    assert template.prompt("say {input} and {0}", "{instruction} \\1") == "say {input} and {0}|{instruction} \\1|{{x}}"
    assert template.prompt("hi", "") == template.prompt("hi", None) == "hi!"


def test_alpaca_template() -> None:
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    assert template.prompt("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert template.prompt("Add.", None) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert template.response_split == "### Response:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "line 1: not valid JSON"),
        ('{"prompt_input":\n oops}', "line 2: not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"prompt_input": "a", "prompt_input": "b"}', "the name 'prompt_input' occurs twice"),
        ('{"prompt_input": "{instruction} {input}", "response_split": ":"}', "needs the key 'prompt_no_input'"),
        ('{"prompt_input": "{instruction} {input}", "prompt_no_input": "{instruction}"}', "'response_split'"),
        ('{"prompt_input": "{instruction} {input}", "prompt_no_input": 3, "response_split": ""}', "with a text"),
        ('{"prompt_input": "{input}", "prompt_no_input": "{instruction}", "response_split": ""}', "{instruction}"),
        ('{"prompt_input": "{instruction}", "prompt_no_input": "{instruction}", "response_split": ""}', "{input}"),
    ],
)
def test_bad_templates(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "template.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        PromptTemplate.load(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_records_to_tokens_with_counts(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    rows = [
        {"instruction": "aa", "input": "b", "output": "bb"},
        {"instruction": "aa", "input": None, "output": "b" * 30},  # cut
        {"instruction": "a" * 40, "input": "", "output": "b"},  # the answer is cut away
        {"instruction": "aa", "input": "", "output": ""},  # no answer
    ]
    data = load(write(tmp_path / "a.jsonl", rows), words="--max_length 20", tokenizer=tokenizer, template=TEMPLATE)
    encoded, report = data.train, data.train_report
    assert encoded.column_names == ["input_ids", "labels"]
    cut = {key: ids[:20] for key, ids in encode_example("Q aa A:", "b" * 30, tokenizer).items()}
    expected = [encode_example("Q aa b A:", "bb", tokenizer), cut]
    assert list(encoded) == expected
    assert (report.rows, report.dropped_rows, report.cut_rows) == (2, 2, 1)
    assert report.tokens == sum(len(row["input_ids"]) for row in expected) == 12 + 20
    assert report.supervised_tokens == 2 + 12
    assert "\n" not in str(report)
    assert "2 dropped" in str(report)


def test_an_empty_answer_is_its_end(tmp_path: Path) -> None:
    tokenizer, name = byte_level_bpe(), write(tmp_path / "a.jsonl", [{"instruction": "aa", "output": "", "id": 1}])
    data = load(name, words="--max_length 20 --add_eos_token", tokenizer=tokenizer, template=TEMPLATE)
    assert data.train[0] == encode_example("Q aa A:", "", tokenizer, add_eos_token=True)
    assert (data.train_report.rows, data.train_report.supervised_tokens) == (1, 1)


def test_real_records(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny")
    dataset = load_records(str(shared / "data" / "alpaca_en.validation.jsonl"))
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    words = "--max_length 256 --add_eos_token"
    data = load(
        str(shared / "data" / "alpaca_en.validation.jsonl"), words=words, tokenizer=tokenizer, template=template
    )
    encoded, report = data.train, data.train_report
    assert report.rows + report.dropped_rows == 99
    assert report.tokens == sum(map(len, encoded["input_ids"]))
    assert all(row["input_ids"][0] == tokenizer.bos_token_id != row["input_ids"][1] for row in encoded)
    eos = tokenizer.eos_token_id
    assert sum(row["labels"][-1] == eos for row in encoded) == report.rows - report.cut_rows
    answer = [label for label in encoded[0]["labels"] if label != -100]
    assert dataset[0]["output"].startswith(tokenizer.decode(answer, skip_special_tokens=True).strip()[:40])


def test_pad_token() -> None:
    tokenizer = byte_level_bpe()
    assert ensure_pad_token(tokenizer, 300) == tokenizer.unk_token_id == tokenizer.pad_token_id
    tokenizer.pad_token = "a"
    assert ensure_pad_token(tokenizer, None) == tokenizer.convert_tokens_to_ids("a")

    without_unk = byte_level_bpe()
    without_unk.unk_token = None
    assert ensure_pad_token(without_unk, 300) == without_unk.eos_token_id == without_unk.pad_token_id


def test_a_pad_token_without_an_embedding_is_not_used() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= 260
    assert ensure_pad_token(tokenizer, 260) == tokenizer.unk_token_id == tokenizer.pad_token_id
    with pytest.raises(UserError, match="no pad, unknown or end-of-sequence token"):
        ensure_pad_token(tokenizer, 0)
