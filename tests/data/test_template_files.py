"""Chat templates by name and from a file, and the one that is saved: it writes the prompt that was trained with."""

import logging
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, MARKERS, MISTRAL, chat_tokenizer, learnt_texts, without_marks
from instruction_rows import ALPACA, CHAT, PLAIN, TEMPLATE, load, write
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokentune.data.chat.template_files import NAMED, load_chat_template
from tokentune.data.chat.templates import ChatEncoder, end_of_answer, stop_at_end
from tokentune.data.formats.conversations import Conversation, openai_conversation
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.settings.data import DataArguments

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi. You ok?"},
    {"role": "user", "content": "ok yes"},
    {"role": "assistant", "content": "yes ok. "},
]


def conversation(messages: list[dict]) -> Conversation:
    return openai_conversation(messages, None, "row 1")


def test_template_files(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    for content, part in (
        (None, "cannot be read: No such file"),
        (b"\xff{{ messages }}", "not UTF-8"),
        (b"Hello", "never mentions `messages`"),
        (b"{% for m in messages %}\n{% endif %}", "line 2: not valid Jinja"),
    ):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_chat_template(str(file), chat_tokenizer(None))
        assert part in str(error.value) and str(file) in str(error.value)
    file.write_text(MISTRAL)
    assert load_chat_template(str(file), chat_tokenizer(None)) == MISTRAL


# ---- by name ---------------------------------------------------------------------------------------------------------

GEMMAS = ["<start_of_turn>", "<end_of_turn>"]


def named_tokenizer(name: str, **options: object) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer(None, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS, *GEMMAS]})
    tokenizer.chat_template = load_chat_template(name, tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("name", "file", "messages"),
    [
        *(("llama-3", "llama3", messages) for messages in (TALK, TALK[1:])),
        *(("qwen", "qwen2_5", messages) for messages in (TALK, TALK[1:])),
        ("gemma", "gemma", TALK[1:]),
        ("gemma", "gemma3", TALK),
        ("chatml", "qwen2_5", TALK),
    ],
)
def test_named_templates_write_what_the_models_own_do(name: str, file: str, messages: list[dict]) -> None:
    own = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / f"{file}.jinja"
    tokenizer = named_tokenizer(name)
    for count in range(1, len(messages) + 1):
        if messages[count - 1]["role"] == "system":  # nobody has asked yet, which most refuse
            continue
        for prompt in (True, False):
            options = {"tokenize": False, "add_generation_prompt": prompt}
            text = tokenizer.apply_chat_template(messages[:count], **options)
            expected = tokenizer.apply_chat_template(messages[:count], chat_template=own.read_text(), **options)
            assert text == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [  # Mistral's format as it is documented for 0.3; Alpaca's, and after it an answer with its end
        ("mistral", "<s>[INST] Be brief.\n\nHello?[/INST] Hi. You ok?</s>[INST] ok yes[/INST]"),
        (
            "alpaca",
            "<s>Be brief.\n\n### Instruction:\nHello?\n\n### Response:\nHi. You ok?</s>\n\n"
            "### Instruction:\nok yes\n\n### Response:\n",
        ),
    ],
)
def test_named_templates_without_a_copy_at_hand(name: str, text: str) -> None:
    tokenizer = named_tokenizer(name)
    assert tokenizer.apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True) == text


def test_the_alpaca_template_begins_as_instructions_do() -> None:
    prompt = TEMPLATE.prompt("Hello?", None)
    for adds_bos in (True, False):
        tokenizer = named_tokenizer("alpaca", adds_bos=adds_bos)
        ids = tokenizer.apply_chat_template(TALK[1:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == tokenizer(prompt)["input_ids"] and (ids[0] == tokenizer.bos_token_id) == adds_bos


@pytest.mark.parametrize("name", NAMED)
def test_answers_are_learnt_in_named_templates(name: str) -> None:
    tokenizer = named_tokenizer(name)
    row = ChatEncoder(tokenizer)(conversation(TALK), "row 1")
    end = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama-3": "<|eot_id|>", "gemma": "<end_of_turn>"}
    end = end.get(name, tokenizer.eos_token)
    texts = learnt_texts(tokenizer, row.ids, row.labels)
    assert [text.removesuffix(end).strip() for text in texts] == ["Hi. You ok?", "yes ok."]
    assert all(text.endswith(end) for text in texts) and end_of_answer(tokenizer) == end
    generation = GenerationConfig(eos_token_id=2)
    stop_at_end(generation, tokenizer)
    assert generation.eos_token_id == (2 if end == "</s>" else [2, tokenizer.convert_tokens_to_ids(end)])


def test_named_templates_take_turns_alone() -> None:
    for name in ("gemma", "mistral"):
        with pytest.raises(UserError, match="take turns"):
            ChatEncoder(named_tokenizer(name))(conversation([TALK[1], *TALK[1:3]]), "row 1")


def test_names_that_do_not_serve() -> None:
    plain = chat_tokenizer(None)
    with pytest.raises(UserError, match=r"cannot be read.* the names alpaca, chatml, gemma, llama-3, mistral, qwen"):
        load_chat_template("chatlm", plain)
    with pytest.raises(UserError, match=r"no token <start_of_turn>, .*: alpaca, chatml, llama-3, mistral, qwen"):
        load_chat_template("gemma", plain)
    plain.eos_token = None
    with pytest.raises(UserError, match=r"no token for the end .*: chatml, llama-3, qwen or a Jinja file"):
        load_chat_template("mistral", plain)


def test_the_help_lists_the_names() -> None:
    help = DataArguments.__dataclass_fields__["chat_template"].metadata["help"]
    assert f": {', '.join(NAMED)}, or a Jinja file" in help


# ---- what is saved ---------------------------------------------------------------------------------------------------

# Braces, quotes and backslashes that mean something to Jinja or JSON; characters of several bytes.
ODD = PromptTemplate("{{ {instruction} }} \"\\\\n\\t' {input}\\n😀:", "{% raw %}{instruction}' \\\\ {input} é\\n:", ":")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [PLAIN, TEMPLATE, ODD])
def test_the_saved_chat_template_writes_the_prompt_that_was_trained_with(
    template: PromptTemplate, adds_bos: bool, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer(None, adds_bos=adds_bos)
    check_saved_prompt(tokenizer, template, tmp_path)


def test_so_it_does_where_a_space_is_put_before_texts(shared: Path, tmp_path: Path) -> None:
    for template in (TEMPLATE, ODD, PLAIN):
        check_saved_prompt(AutoTokenizer.from_pretrained(shared / "models" / "llama-tiny"), template, tmp_path)


def check_saved_prompt(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, folder: Path) -> None:
    rows = [
        {"instruction": "Say {input}.", "input": "", "output": "zyx"},
        {"instruction": "Add {%", "input": "1 {{", "output": "zyx"},
    ]
    data = load(write(folder / "a.jsonl", rows), tokenizer=tokenizer, template=template, words="--add_eos_token")
    tokenizer.chat_template = data.chat_template
    asked = [
        [{"role": "user", "content": "Say {input}."}],
        [{"role": "system", "content": "Add {%"}, {"role": "user", "content": "1 {{"}],
    ]
    for row, messages in zip(data.train, asked, strict=True):
        answered = [*messages, {"role": "assistant", "content": "zyx"}]
        assert tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"] == row["input_ids"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt) - 1] == -100


def test_what_is_saved_of_other_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts that the rows bring along; texts without prompts; a template of the base's own; chats beside others."""
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "<q>Hi", "completion": "ok"}])
    texts = write(tmp_path / "t.jsonl", [{"text": "Once."}])
    chats, alpaca = write(tmp_path / "c.jsonl", [{"messages": CHAT}]), write(tmp_path / "a.jsonl", ALPACA[:2])
    plain, asked = chat_tokenizer(None), [{"role": "user", "content": "<q>Hi"}]
    plain.chat_template = load(prompts, tokenizer=plain).chat_template
    assert plain.apply_chat_template(asked, tokenize=False) == "<s><q>Hi"
    assert load(texts, tokenizer=chat_tokenizer(None)).chat_template is None
    assert load(texts).chat_template == load(chats).chat_template == load(chats, alpaca).chat_template == CHATML
    with caplog.at_level(logging.INFO):
        saved = load(alpaca).chat_template
    assert saved["base"] == CHATML and "message.content" in saved["default"] and "as 'base'" in caplog.text
    again = chat_tokenizer(None)
    again.chat_template = saved
    again.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.chat_template == saved
    assert again.apply_chat_template(asked, tokenize=False) == "<s><q>Hi|"
    assert load(alpaca, tokenizer=again).chat_template == saved  # trained again from there
    assert load(chats, words="--chat_template alpaca").chat_template["base"] == CHATML


def test_system_messages_stay_in_the_user_s_when_the_model_is_asked(tmp_path: Path) -> None:
    chat, tokenizer = [{"role": "system", "content": "Be brief."}, *CHAT], chat_tokenizer(without_marks(CHATML))
    data = load(write(tmp_path / "a.jsonl", [{"messages": chat}]), words="--system_in_user", tokenizer=tokenizer)
    tokenizer.chat_template = data.chat_template["default"]
    assert tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"] == data.train[0]["input_ids"]
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
