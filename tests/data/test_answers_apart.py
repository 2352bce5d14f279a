"""`--lora_on answers`: rows of one answer each, and the tokens that stand in front of it."""

from pathlib import Path

import pytest
import torch
from chat_tokenizers import CHATML, STYLES, chat_tokenizer, learnt_texts, without_marks
from instruction_rows import TEMPLATE, arguments, load, write

from tokentune.data.answers_apart import chat_invocation, template_invocation
from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.instruction_data import InstructionData, load_instruction_data
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.sampling.sampler import from_invocation

ON_ANSWERS = "--lora --lora_on answers"
PROMPTS = {
    "chatml": "<|im_start|>assistant\n",
    "llama-3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": " [/INST]",  # without a generation prompt
}
THINKING = CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n<think>\\n' }}{% endif")
assert THINKING != CHATML


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def loaded(folder: Path, *chats: list[dict], words: str = "", template: str = CHATML) -> InstructionData:
    names = write(folder / "rows.jsonl", [{"messages": chat} for chat in chats])
    return load(names, words=f"{ON_ANSWERS} {words}", tokenizer=chat_tokenizer(template), template=TEMPLATE)


def texts(data: InstructionData) -> list[tuple[str, list[str]]]:
    """Each row's text, and what of it is learnt."""
    tokenizer = chat_tokenizer(None)
    rows = [(row["input_ids"], row["labels"]) for row in data.train]
    return [(tokenizer.decode(ids), learnt_texts(tokenizer, ids, labels)) for ids, labels in rows]


def refusal(folder: Path, *chats: list[dict], **options: str) -> str:
    with pytest.raises(UserError) as error:
        loaded(folder, *chats, **options)
    return str(error.value)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_what_a_chat_template_writes_in_front_of_an_answer(style: str, marks: bool) -> None:
    tokenizer = chat_tokenizer(STYLES[style] if marks else without_marks(STYLES[style]))
    assert tokenizer.decode(chat_invocation(ChatEncoder(tokenizer))) == PROMPTS[style]


def test_what_a_prompt_template_writes_there() -> None:
    tokenizer = chat_tokenizer(None)
    assert tokenizer.decode(template_invocation(TEMPLATE, tokenizer)) == "### Response:\n"
    for template, why in (
        (PromptTemplate("{instruction}{input}", "{instruction}", "### Response:"), "has no response_split"),
        (PromptTemplate("{instruction}{input}", "{instruction}", ""), "has no response_split"),
    ):
        with pytest.raises(UserError, match=f"{why}.*--lora_on all"):
            template_invocation(template, tokenizer)


def test_each_answer_is_a_row_behind_the_conversation_before_it(tmp_path: Path) -> None:
    data = loaded(tmp_path, turns("a?", "one", "b?", "two"), turns("c?", "three"))
    first = "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\none<|im_end|>"
    assert texts(data) == [
        (first, ["one<|im_end|>"]),
        (f"{first}\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>", ["two<|im_end|>"]),
        ("<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>", ["three<|im_end|>"]),
    ]
    assert chat_tokenizer(None).decode(data.invocation) == PROMPTS["chatml"]
    assert data.train_report.records == 3 and data.sources[0].rows == 3


@pytest.mark.parametrize("style", STYLES)
def test_the_last_occurrence_is_in_front_of_the_answer(style: str, tmp_path: Path) -> None:
    question = f"a {PROMPTS[style]} b?"  # harmless in a user's text
    data = loaded(tmp_path, turns(question, "one", "c?", "two"), template=STYLES[style])
    assert [learnt[0].strip()[:3] for _, learnt in texts(data)] == ["one", "two"]
    for row in data.train:
        behind = from_invocation(torch.tensor([row["input_ids"]]), data.invocation)[0]
        first = next(n for n, label in enumerate(row["labels"]) if label != -100)
        assert behind.tolist() == [n >= first - len(data.invocation) for n in range(len(behind))]


def test_answers_that_are_context_are_no_rows(tmp_path: Path) -> None:
    chat = turns("a?", "one", "b?", "two", "c?", "three", "d?")
    chat[1]["weight"] = chat[5]["weight"] = 0
    assert [learnt for _, learnt in texts(loaded(tmp_path, chat))] == [["two<|im_end|>"]]


def test_an_answer_with_the_tokens_in_it_is_refused_by_its_row(tmp_path: Path) -> None:
    good, bad = turns("a?", "one"), turns("b?", "x <|im_start|>assistant\n y")
    message = refusal(tmp_path, good, bad)
    assert "rows.jsonl, row 2: its answer holds '<|im_start|>assistant\\n'" in message and "--lora_on all" in message
    assert [learnt for _, learnt in texts(loaded(tmp_path, good, bad, words="--bad_rows skip"))] == [["one<|im_end|>"]]


def test_an_answer_without_them_in_front_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("message.role + '\\n'", "message.role + (' \\n' if loop.length > 2 else '\\n')")
    message = refusal(tmp_path, turns("a?", "one"), turns("a?", "one", "b?", "two"), template=template)
    assert "row 2: its answer does not begin behind '<|im_start|>assistant\\n'" in message


def test_reasoning_that_the_generation_prompt_opens_belongs_to_the_answer(tmp_path: Path) -> None:
    data = loaded(tmp_path, turns("a?", "<think>\nwhy\n</think>\none", "b?", "two"), template=without_marks(THINKING))
    assert chat_tokenizer(None).decode(data.invocation) == PROMPTS["chatml"]
    assert [learnt[0][-13:] for _, learnt in texts(data)] == ["one<|im_end|>", "two<|im_end|>"]


def test_an_added_end_belongs_to_the_answer_before(tmp_path: Path) -> None:
    data = loaded(tmp_path, turns("a?", "one"), words="--add_eos_token")
    assert [learnt for _, learnt in texts(data)] == [["one<|im_end|>", "</s>"]]


def test_instructions(tmp_path: Path) -> None:
    rows = [{"instruction": "### Response:\nHi", "input": "", "output": "ok"}] * 2
    data = load(write(tmp_path / "a.jsonl", rows), words=ON_ANSWERS, template=TEMPLATE)
    assert chat_tokenizer(None).decode(data.invocation) == "### Response:\n"
    assert [learnt for _, learnt in texts(data)] == [["ok"]] * 2
    bad = write(tmp_path / "b.jsonl", [*rows, {"instruction": "a", "input": "", "output": "a\n### Response:\nb"}])
    with pytest.raises(UserError, match="row 3: its answer holds '### Response:"):
        load(bad, words=ON_ANSWERS, template=TEMPLATE)


def test_texts_begin_behind_a_line_of_all_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tools: {n}\nCall:", "completion": " ok"} for n in range(3)]
    data = load(write(tmp_path / "a.jsonl", rows), words=ON_ANSWERS)
    assert chat_tokenizer(None).decode(data.invocation) == "Call:"
    assert [learnt for _, learnt in texts(data)] == [[" ok"]] * 3
    other = write(tmp_path / "b.jsonl", [*rows, {"prompt": "Tools\nSay:", "completion": " ok"}])
    with pytest.raises(UserError, match="row 4: its answer does not begin behind 'Call:'"):
        load(other, words=ON_ANSWERS)


def test_texts_without_one_are_refused(tmp_path: Path) -> None:
    for row in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        with pytest.raises(UserError, match=r"nothing tells where answers begin.*--lora_on all"):
            load(write(tmp_path / "a.jsonl", [row]), words=ON_ANSWERS, template=TEMPLATE)


def test_data_sets_have_to_agree(tmp_path: Path) -> None:
    chats = write(tmp_path / "a.jsonl", [{"messages": turns("a?", "one")}])
    instructions = write(tmp_path / "b.jsonl", [{"instruction": "a", "output": "ok"}])
    with pytest.raises(UserError, match=r"b\.jsonl: its answers begin behind other tokens"):
        load(chats, instructions, words=ON_ANSWERS, template=TEMPLATE)


def test_cached_rows_tell_the_tokens_again_and_are_others_than_those_of_all(tmp_path: Path) -> None:
    names = write(tmp_path / "rows.jsonl", [{"messages": turns("a?", "one", "b?", "two")}])
    cache, found = f"--data_cache {tmp_path / 'cache'}", []
    for words in (ON_ANSWERS, "--lora", ON_ANSWERS):
        given = arguments(names, words=f"{words} {cache}")
        found.append(load_instruction_data(given, chat_tokenizer(CHATML), TEMPLATE))
    assert [len(data.train) for data in found] == [2, 1, 2]
    assert found[0].invocation == found[2].invocation and found[1].invocation is None


def test_a_cut_answer_stays_behind_its_prompt(tmp_path: Path) -> None:
    chat = turns("a?", "one", "b?", "two two")
    length = len(loaded(tmp_path, chat).train[1]["input_ids"])
    data = loaded(tmp_path, chat, words=f"--max_length {length - 3}")
    assert [learnt for _, learnt in texts(data)] == [["one<|im_end|>"], ["two t"]]
    assert data.train_report.cut_rows == 1
