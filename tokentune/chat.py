"""Command: talk to a trained model, in the prompt that it was trained with.

    python tokentune/chat.py models/my-run "Name three colours."

The folder is a run's, with all weights or an adapter (whose base it names), or a merged model's. The prompt is that of
the tokenizer's chat template, which every run saves; without one, texts are continued as they are. Answers are printed
while they are written: one question as an argument or from standard input, on a terminal a conversation.
"""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from tokentune.cli.start import start

    start("chat")  # before the imports below, which take seconds

with suppress(ImportError):
    import readline  # noqa: F401 (arrow keys within a question)

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from tokentune.cli.arguments import arguments_of, flags_given
from tokentune.cli.command import log_to_stderr, run_command
from tokentune.data.chat.templates import end_of_answer, stop_at_end
from tokentune.errors import UserError
from tokentune.models.trained import load_trained
from tokentune.settings.chat import ChatArguments, ChattingArguments
from tokentune.settings.flags import require
from tokentune.sources import first_line

Messages = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv`: the words after it; None means the process's own. Raises UserError on bad input."""
    log_to_stderr()
    logging.disable_progress_bar()
    settings = arguments_of(flags_given(argv, ChatArguments), ChatArguments).chatting
    question = settings.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        require(question != "", "standard input is empty: give a question there, or behind the folder")
    with out_of_memory_told(settings.device):
        trust = {"trust_remote_code": settings.trust_remote_code, "allow_pickle": settings.allow_pickle}
        base, name = settings.base_model_name_or_path, settings.model_name_or_path
        chat = Chat(*load_trained(name, base=base, device=settings.device, **trust), settings)
        if question is not None:
            chat.answer(question)
        else:
            converse(chat)


def converse(chat: "Chat") -> None:
    """Questions from the terminal, until its end."""
    print("/new begins a new conversation; /exit or Ctrl-D ends.", file=sys.stderr)
    with suppress(EOFError):
        while (question := input("> ").strip()) != "/exit":
            if question == "/new":
                chat.forget()
            elif question:
                chat.answer(question)


class Chat:
    """A conversation with a model.

    Raises:
        UserError: a system message for a model without a chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ChattingArguments) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        require(
            tokenizer.chat_template is not None or settings.system is None,
            "--system: this model has no chat template, so that it takes texts alone. Leave it out.",
        )
        stop_at_end(model.generation_config, tokenizer)
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else {*(ends or ())}
        end = end_of_answer(tokenizer)
        self.stop = end if len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1 else ""
        self.options = {"max_new_tokens": settings.max_new_tokens, "num_beams": 1}
        if settings.temperature > 0:
            self.options |= {"do_sample": True, "temperature": settings.temperature}
        else:
            self.options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.stop:
            self.options |= {"stop_strings": self.stop, "tokenizer": tokenizer}
        if model.generation_config.pad_token_id is None:
            self.options["pad_token_id"] = next(iter(self.ends), None)
        self.forget()

    def forget(self) -> None:
        """Begins a new conversation."""
        system = self.settings.system
        self.messages: Messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, question: str) -> str:
        """Prints the answer while it is written, and returns it. Raises UserError: the chat template's refusal."""
        self.messages.append({"role": "user", "content": question})
        inputs = self._encoded()
        streamer = _Printer(self.tokenizer, self.ends, self.stop)
        with torch.inference_mode():
            self.model.generate(**inputs, streamer=streamer, **self.options)
        self.messages.append({"role": "assistant", "content": streamer.text.strip()})
        return streamer.text

    def _encoded(self) -> dict[str, torch.Tensor]:
        """The prompt's ids and mask, (1, S) each."""
        if self.tokenizer.chat_template is None:
            encoded = self.tokenizer(self.messages[-1]["content"], return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # a template is a program, and may fail in any way
                raise UserError(f"the chat template does not take this conversation: {first_line(error)}") from error
        return {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


class _Printer(TextStreamer):
    """Prints an answer without its end: one of the tokens `ends`, or the text `stop`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], stop: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ends, self.stop, self.written, self.text = ends, stop, "", ""

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self.ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.written += text
        whole = self.written.partition(self.stop)[0] if self.stop else self.written
        if whole == self.written and not stream_end:  # the end may have begun
            begun = (n for n in range(len(self.stop) - 1, 0, -1) if whole.endswith(self.stop[:n]))
            whole = whole[: len(whole) - next(begun, 0)]
        print(whole[len(self.text) :], end="\n" if stream_end else "", flush=True)
        self.text = whole


@contextmanager
def out_of_memory_told(device: str) -> Iterator[None]:
    """Turns a GPU's lack of memory into a UserError. `device`: the flag's value."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"--device {device}: the GPU's memory is too small. Give --device cpu.") from error


if __name__ == "__main__":
    run_command(main)
