"""Talking to a trained model: it says what it learnt, in the prompt that it was trained with, and nothing else."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from adapters_on_disk import make_adapter, make_base
from chat_tokenizers import CHATML, chat_tokenizer, without_marks
from conftest import tiny_llama_config
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from tokentune import finetune
from tokentune.chat import Chat, _Printer, converse, main
from tokentune.errors import UserError
from tokentune.file_names import CARD_NAME
from tokentune.merge import merge
from tokentune.models.pretrained import load_tokenizer
from tokentune.models.trained import load_trained
from tokentune.settings.chat import ChattingArguments

WORDS = ("amber", "blue", "cyan", "denim", "ecru", "fawn", "gold", "hazel", "ivory", "jade")
# So small a model needs many steps and a high rate; all else is the default.
LEARNING = "--num_epochs 40 --learning_rate 1e-2"
BESIDE = "--report_to none --skip_memory_probe --skip_verification"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers the ten questions wrongly. Its tokenizer has ChatML's tokens and no chat template."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    tokenizer = chat_tokenizer(None)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(tiny_llama_config(**sizes, bos_token_id=1, eos_token_id=2))
    texts = [
        tokenizer.apply_chat_template(chat(n, wrong), chat_template=CHATML, tokenize=False)
        for n, wrong in enumerate(WORDS[3:] + WORDS[:3])
    ]
    tokenizer.pad_token = tokenizer.unk_token
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def chat(number: int, word: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {number}{number}{number}?"},
        {"role": "assistant", "content": f"It is {word}."},
    ]


def trained(base: Path, rows: list[dict], words: str) -> Path:
    """The folder of a run on these rows, in a folder beside the base."""
    data = base.parent / f"rows{len(list(base.parent.iterdir()))}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--model_name_or_path", str(base), "--dataset_name_or_path", str(data)]
    finetune.main([*names, "--model_save_path", str(data.with_suffix("")), *words.split(), *BESIDE.split()])
    (folder,) = data.with_suffix("").iterdir()
    return folder


@pytest.fixture(scope="module")
def chats(base: Path) -> Path:
    """An adapter that was trained on ten chats."""
    rows = [{"messages": chat(n, word)} for n, word in enumerate(WORDS)]
    return trained(base, rows, f"--lora --tokentune --chat_template chatml {LEARNING}")


@pytest.fixture(scope="module")
def instructions(base: Path) -> Path:
    """All weights, trained on ten instructions in a prompt of their own, half of them with an input."""
    prompt = {"prompt_input": "{instruction}: {input} =", "prompt_no_input": "{instruction} =", "response_split": "="}
    (file := base.parent / "prompt.json").write_text(json.dumps(prompt))
    rows = [{"instruction": f"What is {n}{n}{n}?", "input": "", "output": f"It is {WORDS[n]}."} for n in range(5)]
    rows += [{"instruction": "Name it", "input": str(n), "output": f"{WORDS[n]}"} for n in range(5, 10)]
    return trained(base, rows, f"--tokentune --add_eos_token --prompt_template_name_or_path {file} {LEARNING}")


def snippet_of(folder: Path) -> str:
    """The code of the model card in a folder, about this folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / CARD_NAME).read_text(), flags=re.DOTALL)
    return code.replace("path/of/this/model", str(folder))


def said(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What the command prints for these words."""
    capsys.readouterr()
    main([*map(str, words)])
    return capsys.readouterr().out


def test_ten_chats_are_learnt_and_said(chats: Path, capsys: pytest.CaptureFixture) -> None:
    losses = [entry["loss"] for entry in json.loads((chats / "training_summary.json").read_text())["log"]]
    assert losses[-1] < losses[0] / 2
    for n, word in enumerate(WORDS):
        assert said(capsys, chats, f"What is {n}{n}{n}?") == f"It is {word}.\n"


def test_adapters_on_answers_alone(base: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"messages": chat(n, word)} for n, word in enumerate(WORDS)]
    words = f"--lora --lora_on answers --lora_r 16 --lora_target_modules all-linear --chat_template chatml {LEARNING}"
    folder = trained(base, rows, f"{words} --tokentune --prefix_length answers")
    for n, word in enumerate(WORDS):
        assert said(capsys, folder, f"What is {n}{n}{n}?") == f"It is {word}.\n"
    exec(compile(snippet_of(folder).replace("Name three colours.", "What is 333?"), "card", "exec"), {})
    assert capsys.readouterr().out == "It is denim.\n"


def test_the_prompt_of_instructions_is_found_again(instructions: Path, capsys: pytest.CaptureFixture) -> None:
    assert said(capsys, instructions, "What is 333?") == "It is denim.\n"
    assert said(capsys, instructions, "7", "--system", "Name it") == "hazel\n"  # instruction and input
    assert said(capsys, instructions, "What is 333?", "--max_new_tokens", "3") == "It \n"


def test_a_merged_model_and_its_card(chats: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Merging carries the prompt and the end of an answer on; the snippet of each card writes the answer."""
    merge(str(base), str(chats), str(tmp_path / "merged"))
    assert said(capsys, tmp_path / "merged", "What is 333?") == "It is denim.\n"
    end = load_tokenizer(str(chats)).convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [2, end]
    for folder in (chats, tmp_path / "merged"):
        code = snippet_of(folder).replace("Name three colours.", "What is 333?")
        capsys.readouterr()
        exec(code, {})
        assert capsys.readouterr().out == "It is denim.\n"


def test_a_fully_trained_model_s_card(instructions: Path, capsys: pytest.CaptureFixture) -> None:
    exec(snippet_of(instructions).replace("Name three colours.", "What is 333?"), {})
    assert capsys.readouterr().out == "It is denim.\n"


def test_questions_from_standard_input(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 555?\n"))
    assert said(capsys, "--model_name_or_path", chats) == "It is fawn.\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="standard input is empty"):
        main([str(chats)])


def test_a_conversation(chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    chat = Chat(*load_trained(str(chats), allow_pickle=False), ChattingArguments(str(chats), system="Count."))
    asked, seen = iter(["What is 111?", "", "What is 222?", "/new", "What is 111?", "/exit", "never"]), []
    encoded = chat._encoded
    monkeypatch.setattr(chat, "_encoded", lambda: seen.append([m["content"] for m in chat.messages]) or encoded())
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    converse(chat)
    assert [len(messages) for messages in seen] == [2, 4, 2] and seen[1][:2] == ["Count.", "What is 111?"]
    assert next(asked) == "never" and len(capsys.readouterr().out.splitlines()) >= 3
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    converse(chat)  # Ctrl-D


@pytest.mark.parametrize("stop", ["<stop>", ""])
def test_an_answer_is_printed_while_it_is_written_without_its_end(stop: str, capsys: pytest.CaptureFixture) -> None:
    tokenizer = chat_tokenizer(None)
    printer = _Printer(tokenizer, {2}, stop)
    printer.put(tokenizer("prompt", return_tensors="pt").input_ids)
    written = []
    for token in [*tokenizer("a <b <s\n <stop>", add_special_tokens=False).input_ids, 2]:
        printer.put(torch.tensor([token]))
        written.append(capsys.readouterr().out)
    printer.end()
    assert "".join(written) + capsys.readouterr().out == f"a <b <s\n {'' if stop else '<stop>'}\n"
    assert written.count("") < len(written) - 2  # not all at the end


def test_four_bits_as_in_training(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_adapter(base, base.parent / "over-4-bits")
    (folder / "training_summary.json").write_text(json.dumps({"settings": {"qlora": True}}))
    kinds = {type(module).__name__ for module in load_trained(str(folder), allow_pickle=False)[0].modules()}
    assert "Linear4bit" in kinds
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model, _ = load_trained(str(folder), allow_pickle=False)
    assert "Linear4bit" not in {type(module).__name__ for module in model.modules()}
    assert "trained over 4 bits, here its base is used as it is" in caplog.text


def test_what_is_refused(base: Path, chats: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", base, hidden_size=64, intermediate_size=128)
    unfinished = tmp_path / "unfinished" / "checkpoint-8"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text("{}")
    elsewhere = make_adapter(base, tmp_path / "adapter")
    config = json.loads((elsewhere / "adapter_config.json").read_text())
    (elsewhere / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    for words, part in (
        ([tmp_path / "none", "x"], "none: no such folder"),
        ([tmp_path / "unfinished", "x"], "Its newest checkpoint is .*checkpoint-8"),
        ([elsewhere, "x"], "--base_model_name_or_path /gone: no such folder"),
        ([chats, "x", "--base_model_name_or_path", other], "not the base that .*\nGive that base.$"),
        ([base, "x", "--base_model_name_or_path", base], "is no adapter's folder"),
        ([base, "x", "--system", "s"], "--system: this model has no chat template"),
        ([base, "x", "y"], "unexpected argument 'y'"),
        ([], "required: FOLDER"),
        ([base, "x", "--temperature", "-1"], "--temperature -1.0: must be 0 or more"),
        ([base, "x", "--device", "moon"], "--device moon: cannot be used here"),
    ):
        with pytest.raises(UserError, match=part):
            main([*map(str, words)])


def test_a_base_without_a_chat_template_continues_texts(base: Path, capsys: pytest.CaptureFixture) -> None:
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    assert len(said(capsys, base, "two\nlines", "--max_new_tokens", "4", "--temperature", "0.5")) > 1


def test_a_template_s_refusal_is_one_sentence(base: Path, tmp_path: Path) -> None:
    model, _ = load_trained(str(base), allow_pickle=False)
    tokenizer = chat_tokenizer("{{ raise_exception('no system here') if messages[0].role == 'system' }}" + CHATML)
    chat = Chat(model, tokenizer, ChattingArguments("x", system="s"))
    with pytest.raises(UserError, match="does not take this conversation: no system here"):
        chat.answer("x")
    for end, stop in (("<|im_end|>", ""), ("<end>", "<end>")):  # the first is a token
        tokenizer.chat_template = without_marks(CHATML).replace("<|im_end|>", end)
        assert Chat(model, tokenizer, ChattingArguments("x")).stop == stop
