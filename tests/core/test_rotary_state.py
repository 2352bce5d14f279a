"""Rotary frequencies that follow the lengths of batches: put back around evaluations, kept in checkpoints."""

import copy
import json
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from conftest import tiny_llama_config
from killable_runs import Killed, Run, assert_same_run, die, run, run_folder_in, stop_at
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from tokentune import apply_tokentune
from tokentune.core.compat.rotary_state import read, rotary_state, rotary_state_kept, set_rotary_state, written
from tokentune.data.packing_check import check_separation
from tokentune.errors import UserError
from tokentune.verify.tiny_copy import tiny_copy

__all__ = ["run"]  # a fixture
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def llama(rope: dict) -> nn.Module:
    positions = 64 if rope["rope_type"] == "longrope" else 16
    return LlamaForCausalLM(tiny_llama_config(rope_parameters=rope, max_position_embeddings=positions))


def gemma() -> nn.Module:
    """Each kind of layer with a rotary embedding of its own, in one module."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 8}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    rope = {"rope_parameters": {"sliding_attention": DEFAULT, "full_attention": DYNAMIC}}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **kinds, **rope, **heads))


MODELS = {"dynamic": lambda: llama(DYNAMIC), "per layer": gemma, "longrope": lambda: llama(LONG)}


def ids(length: int) -> Tensor:
    return torch.arange(3, 3 + length)[None]


def logits(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        return model(ids(length)).logits


@pytest.mark.parametrize("seen", [None, 8, 20])
@pytest.mark.parametrize("name", MODELS)
def test_other_batches_leave_no_trace(name: str, seen: int | None) -> None:
    """Before any batch, after a short one, after one beyond the pretraining length of 16."""
    model = MODELS[name]().eval()
    if seen is not None:
        logits(model, seen)
    untouched = copy.deepcopy(model)
    with rotary_state_kept(model):
        logits(model, 60)
        logits(model, 5)
        logits(model, 40)
    for length in (18, 24, 6, 18):
        assert torch.equal(logits(model, length), logits(untouched, length))


@pytest.mark.parametrize("name", ["dynamic", "per layer"])
def test_a_longer_batch_does_leave_one(name: str) -> None:
    """Else the test above could not fail."""
    model = MODELS[name]().eval()
    before = logits(model, 18)
    logits(model, 60)
    assert not torch.equal(logits(model, 18), before)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_to_the_last_bit(name: str) -> None:
    model = MODELS[name]().eval()
    other = copy.deepcopy(model)
    logits(model, 50)
    set_rotary_state(other, read(json.loads(json.dumps(written(rotary_state(model))))))
    for length in (18, 55, 30):
        assert torch.equal(logits(model, length), logits(other, length))


def test_frequencies_that_stay_are_not_kept() -> None:
    assert rotary_state(llama(DEFAULT)) == rotary_state(llama({**DYNAMIC, "rope_type": "linear"})) == {}


@pytest.mark.parametrize("name", ["dynamic", "per layer"])
def test_the_tiny_copy_reaches_the_length_at_which_frequencies_change(name: str) -> None:
    """However long the pretraining length is."""
    model = MODELS[name]()
    model.config.max_position_embeddings = 4096
    tiny = tiny_copy(model)
    assert tiny.config.max_position_embeddings <= 5
    before = written(rotary_state(tiny))
    tiny(input_ids=ids(19))
    assert written(rotary_state(tiny)) != before
    assert model.config.max_position_embeddings == 4096


def test_a_step_beyond_the_length_follows_the_definition() -> None:
    model, positions = llama(DYNAMIC).double(), torch.tensor([[1, 4, 9, 20, 28]])
    plain = copy.deepcopy(model)
    with oracle.constants_outside(plain, positions, oracle.LLAMA):
        expected = oracle.next_token_loss(plain(ids(30)).logits, ids(30), positions)
    gradients = oracle.gradients(plain, expected)
    loss = apply_tokentune(model)(ids(30), labels=ids(30), selected_positions=positions).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = oracle.gradients(model, loss)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-4), name


@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_would_change_one_another(name: str, selective: bool) -> None:
    model = MODELS[name]()
    with pytest.raises(UserError, match=r"--packing: .* does not keep the documents of a row apart"):
        check_separation(apply_tokentune(model) if selective else model)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows on both sides of the pretraining length, the longest last."""
    folder = tmp_path_factory.mktemp("dynamic") / "model"
    shutil.copytree(tiny_llama_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = [{"prompt": "The number is", "completion": f" {'9' * (9 * n + 2)}"} for n in range(8)]
    for name, chosen in (("rows", rows), ("validation", rows[-2:])):
        path = folder.parent / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return (
        f"--model_name_or_path {folder} --dataset_name_or_path {folder.parent / 'rows.jsonl'} "
        f"--eval_dataset_name_or_path {folder.parent / 'validation.jsonl'} --lora --lora_dropout 0 "
        "--lora_target_modules all-linear --tokentune --prefix_length 0.3 --skip_memory_probe"
    )


def test_a_resumed_run_is_the_uninterrupted_one(words: str, run: Run, tmp_path: Path) -> None:
    expected = run(tmp_path / "whole", f"{words} --save_steps 1")
    for micro_batch in (7, 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, micro_batch, die)
            run(tmp_path / "killed", f"{words} --save_steps 1 --resume_from_checkpoint last")
    assert_same_run(run(tmp_path / "killed", f"{words} --save_steps 1 --resume_from_checkpoint last"), expected)
    saved = json.loads((run_folder_in(tmp_path / "whole") / "checkpoint-6" / "run_state.json").read_text("utf-8"))
    (of_process,) = saved["rotary"]
    assert next(iter(of_process.values()))["max_seq_len_cached"] > 32


def test_evaluating_changes_nothing(words: str, run: Run, tmp_path: Path) -> None:
    often, seldom = (
        load_file(run(tmp_path / steps, f"{words} --eval_steps {steps}") / "adapter_model.safetensors")
        for steps in ("1", "9")
    )
    assert [name for name in often if not torch.equal(often[name], seldom[name])] == []
