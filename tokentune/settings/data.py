"""Flags: the rows that are learnt from and evaluated on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokentune.settings.flags import REQUIRED, Group, flag, require

DEFAULT_TEMPLATE = str(Path(__file__).resolve().parents[1] / "alpaca_template.json")

_SPLIT = "the split of the training data, where the folder or hub id has several for it: train_sft, ..."
_CONFIG = "the configuration of the training data, where the folder or hub id has several: main, ..."
_ONE_EACH = "one name for all data sets, or one for each"


@dataclass
class RowsArguments(Group):
    """Which rows are learnt from and evaluated on, and how many tokens of them: every command's."""

    _argument_group_name = "data"
    dataset_name_or_path: str = flag(
        REQUIRED,
        "hub id, or local .json, .jsonl, .csv or .parquet file or folder; columns: instruction, "
        "input (may be absent), output",
        filled="a hub id, a file or a folder",
    )
    max_length: int = flag(1024, "tokens per sequence; longer ones are cut at the end", least=2)
    num_workers: int = flag(0, "data-loader worker processes", least=0)
    eval_dataset_name_or_path: str | None = flag(
        None, "validation data, as the training data: its loss (all tokens, no selection) before and after training"
    )
    eval_steps: int | None = flag(None, "also every so many optimizer steps", least=1)
    dataset_split: str | None = flag(None, _SPLIT, filled="a name, or leave it out")
    dataset_config: str | None = flag(None, _CONFIG, filled="a name, or leave it out")
    eval_dataset_split: str | None = flag(
        None, "as --dataset_split, of the validation data", filled="a name, or leave it out"
    )
    eval_dataset_config: str | None = flag(
        None, "as --dataset_config, of the validation data", filled="a name, or leave it out"
    )
    group_by_length: bool = flag(
        False,
        "batches of rows with about as many tokens, and with --tokentune about as many selected ones: less padding, in "
        "an order that is a little less random",
    )
    bad_rows: Literal["stop", "skip"] = flag(
        "stop", "what becomes of a run with rows that cannot be used: it ends and names them, or they are left out"
    )


@dataclass
class DataArguments(RowsArguments):
    """Instruction data, conversations or plain text, and the prompt that they are put into."""

    dataset_name_or_path: list[str] = flag(
        REQUIRED,
        "one or several of: hub id, or local .json, .jsonl, .csv or .parquet file or folder; "
        "--data_format says what their columns may be",
    )
    dataset_weights: list[float] = flag(
        [],
        "the share of each of several data sets in what is trained on, e.g. 0.7 0.3: rows of those "
        "that are too small for theirs come several times; by default every row once",
    )
    dataset_split: list[str] = flag([], f"{_SPLIT}; {_ONE_EACH}")
    dataset_config: list[str] = flag([], f"{_CONFIG}; {_ONE_EACH}")
    data_format: Literal["auto", "alpaca", "alpaca_chat", "prompt_completion", "messages", "sharegpt", "text"] = flag(
        "auto",
        "auto: told by the columns; alpaca: instruction, input (may be absent), output; alpaca_chat: the same as a "
        "chat, with LLaMA-Factory's system and history; prompt_completion: prompt, completion; messages: messages "
        "(OpenAI's role, content); sharegpt: conversations (from, value); text: text",
        metavar="NAME",
    )
    prompt_template_name_or_path: str = flag(
        DEFAULT_TEMPLATE, "JSON file with prompt_input, prompt_no_input and response_split"
    )
    chat_template: str | None = flag(
        None,
        "what to put conversations into, instead of the tokenizer's own chat template: alpaca, chatml, gemma, llama-3, "
        "mistral, qwen, or a Jinja file",
        filled="a name or a path, or leave it out",
    )
    system_in_user: bool = flag(
        False, "put system and developer messages in front of the user's, for chat templates without such a role"
    )
    tokenize_workers: int | None = flag(
        None,
        "processes that tokenize; by default one for each core, up to 8, where there are more than 1,000 rows",
        least=1,
    )
    add_eos_token: bool = flag(False, "end every answer with the end-of-sequence token, and learn it")
    long_rows: Literal["cut", "drop"] = flag("cut", "what becomes of rows longer than --max_length")
    packing: bool = flag(
        False, "fill rows up to --max_length with several documents each, which do not attend to one another"
    )
    eval_fraction: float | None = flag(
        None, "split this share of the training data off for validation, by what the rows say: the same in every run"
    )
    streaming: bool = flag(
        False, "read and tokenize while training, for data that does not fit on the disk; needs --max_steps"
    )
    data_cache: str = flag(
        "auto",
        "folder where tokenized data is kept for the next run; auto: below the Hugging Face cache; none: nowhere",
        filled="a path, or leave it out",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights()
        self._check_choices()
        self._check_streaming()
        if self.eval_fraction is not None:
            fraction = f"--eval_fraction {self.eval_fraction}"
            require(0 < self.eval_fraction < 1, f"{fraction}: give a share between 0 and 1, such as 0.05")
            require(
                self.eval_dataset_name_or_path is None,
                f"{fraction} and --eval_dataset_name_or_path both say what to evaluate on: give one of them",
            )
        require(
            self.eval_steps is None or self.eval_dataset_name_or_path is not None or self.eval_fraction is not None,
            "--eval_steps needs data to evaluate on: add --eval_dataset_name_or_path or --eval_fraction",
        )

    def _check_weights(self) -> None:
        weights, names = self.dataset_weights, self.dataset_name_or_path
        if not weights:
            return
        given = f"--dataset_weights {' '.join(map(str, weights))}"
        require(
            len(weights) == len(names), f"{given}: {len(weights)} weights for {len(names)} data sets; give one each"
        )
        require(all(0 <= weight < float("inf") for weight in weights), f"{given}: must be 0 or more")
        require(any(weights), f"{given}: all are 0, so there would be no data")

    def _check_choices(self) -> None:
        names = self.dataset_name_or_path
        for what, given in (("split", self.dataset_split), ("config", self.dataset_config)):
            require(
                len(given) in (0, 1, len(names)),
                f"--dataset_{what} {' '.join(given)}: {len(given)} names for {len(names)} data sets; give one for all, "
                "or one each",
            )
            require(
                getattr(self, f"eval_dataset_{what}") is None or self.eval_dataset_name_or_path is not None,
                f"--eval_dataset_{what} chooses from validation data: add --eval_dataset_name_or_path",
            )

    def chosen(self, number: int) -> dict[str, str | None]:
        """The split and the configuration that are asked for of one of the data sets."""
        asked = {"split": self.dataset_split, "config": self.dataset_config}
        return {what: given[min(number, len(given) - 1)] if given else None for what, given in asked.items()}

    def _check_streaming(self) -> None:
        if not self.streaming:
            return
        require(
            not self.packing,
            "--streaming with --packing: which documents fill a row is chosen by all their lengths, which a stream "
            "does not know beforehand. Leave one of them out",
        )
        require(
            not self.group_by_length,
            "--streaming with --group_by_length: batches are made as rows are read, before others are known. Leave one "
            "of them out",
        )
        require(
            self.eval_fraction is None,
            "--streaming with --eval_fraction: the validation rows would be complete only once all data was read. "
            "Put them into a file of their own: --eval_dataset_name_or_path",
        )
