"""Tiny models, a tokenizer and instruction data that the tests make themselves, and the real ones where at hand."""

import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tokentune-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers below 5.23
    PreTrainedModel.activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
    PreTrainedModel.activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "### Instruction: ### Input: ### Response: the quick brown fox jumps over the lazy dog 0123456789",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, which else one process would still work on when the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Runs and merges collect garbage, 0.4 s each time with all modules among it: half of the suite's time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Tokens that runs of the tests keep for later runs do not stay on this machine."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_messages() -> Iterator[None]:
    """A command sets up the project's logger, and as one of several processes silences it: not for the next test."""
    logger = logging.getLogger("tokentune")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers = handlers


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("real data and models (../shared) are not on this machine")
    return SHARED


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test fails where a command is about to load a causal language model's weights."""
    from bad_input import no_weights

    from tokentune.models import builder

    monkeypatch.setattr(builder, "load_base_model", no_weights)


@pytest.fixture
def refused(
    tiny_llama_dir: Path,
    alpaca_file: Path,
    tmp_path: Path,
    no_weights_read: None,
    capsys: pytest.CaptureFixture,
) -> Callable[..., str]:
    """Runs finetune.py on good input with some flags replaced; checks that it is refused before any weight is read."""
    from bad_input import refusal

    from tokentune import finetune

    given = {"--model_name_or_path": tiny_llama_dir, "--dataset_name_or_path": alpaca_file}
    given |= {"--model_save_path": tmp_path / "models"}
    return lambda *words: refusal(finetune.main, given, words, tmp_path, capsys)


@pytest.fixture
def recorder(tmp_path: Path) -> tuple[dict[str, str], Callable[[], list[list[str]]]]:
    """Environment that makes the scripts run a stand-in for python, and a function that reads its calls."""
    from bash_scripts import recording

    return recording(tmp_path)


@pytest.fixture
def make_trainer(tiny_llama_dir: Path, tmp_path: Path) -> Callable:
    """Builds a trainer on the tiny Llama from flags, as the command does."""
    from small_trainer import trainer_maker

    return trainer_maker(tiny_llama_dir, tmp_path)


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """Two grouped-query layers, hidden size 32."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return LlamaConfig(**{**sizes, **heads, "pad_token_id": None, **changes})


def tiny_bert_config(**changes: object) -> BertConfig:
    """Two layers, hidden size 32, no dropout."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**{**sizes, **heads, **dropout, **changes})


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama with a byte-level tokenizer that has bos and eos and no pad token."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(vocab_size=len(fast))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen Alpaca-like records as JSON Lines, half of them with an input."""
    path = tmp_path_factory.mktemp("data") / "tiny_alpaca.jsonl"
    records = [
        {
            "instruction": f"Repeat the number {n}." if n % 2 else "Repeat the word.",
            "input": "" if n % 2 else f"word{n}",
            "output": f"The number is {n}." if n % 2 else f"word{n} word{n}",
        }
        for n in range(16)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
