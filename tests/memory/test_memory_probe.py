"""The step before training: it leaves no trace, counts what a step takes, and says what would make it fit."""

import json
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from small_trainer import arguments_for, make_rows
from torch import Tensor

from tokentune import finetune
from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import SeededRows
from tokentune.data.packing import pack
from tokentune.data.prompts import ensure_pad_token
from tokentune.errors import UserError
from tokentune.memory import available_memory
from tokentune.memory import probe as memory_probe
from tokentune.memory.advice import advice, together
from tokentune.memory.available_memory import available_bytes
from tokentune.memory.footprint import measure
from tokentune.memory.longest_rows import answer_share, longest_batch
from tokentune.memory.probe import choose_micro_batch, generous_bytes, last_that_fits, probe_memory, weights_of
from tokentune.memory.trial_step import try_batch
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.settings.finetune import Arguments
from tokentune.training.build import build_trainer
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import build_training_arguments

Build = Callable[..., tuple[SelectiveTrainer, Arguments]]


@pytest.fixture
def build(tiny_llama_dir: Path, tmp_path: Path) -> Build:
    """A trainer on the tiny Llama from flags, and these flags."""

    def make(words: str, *, rows: list | None = None, dtype: torch.dtype | None = None) -> Any:
        arguments = arguments_for(tiny_llama_dir, tmp_path, f"{words} --skip_verification".strip())
        torch.manual_seed(0)
        model = prepare_model(arguments, base_dtype(arguments, load_config(str(tiny_llama_dir))))
        tokenizer = load_tokenizer(str(tiny_llama_dir))
        ensure_pad_token(tokenizer, model.config.vocab_size)
        settings = build_training_arguments(arguments, tmp_path / "run")
        train = SeededRows(make_rows(19) if rows is None else rows, arguments.optimization.seed)
        train = pack(train, arguments.data.max_length) if arguments.data.packing else train
        validation = make_rows(5, seed=5) if "--eval_dataset" in words else None
        model = model if dtype is None else model.to(dtype)
        return build_trainer(model, settings, train, validation, tokenizer, arguments), arguments

    return make


@pytest.fixture
def config(tiny_llama_dir: Path) -> Any:
    return load_config(str(tiny_llama_dir))


def weights(trainer: SelectiveTrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


# --- no trace ---------------------------------------------------------------------------------------------------------

EVALUATED = "--global_batch_size 4 --learning_rate 1e-2 --eval_dataset_name_or_path rows.jsonl"


@pytest.mark.parametrize(
    "words",
    [
        "--gradient_accumulation_steps 2",
        "--tokentune --prefix_length 0.3 --lora --lora_dropout 0.5 --bf16",
        "--tokentune --prefix_length 0.3 --gradient_checkpointing --optim adamw_torch_fused",
        "--optim_in_backward --max_grad_norm 0",
        "--optim adafactor",
        "--qlora --tokentune --optim adamw_bnb_8bit",
    ],
)
def test_a_run_with_it_is_the_run_without_it(words: str, build: Build, config: Any) -> None:
    runs = []
    for probed in (False, True):
        trainer, arguments = build(f"{EVALUATED} {words}")
        torch.manual_seed(7)
        if probed:
            assert probe_memory(trainer, arguments, config) > 0
        trainer.train()
        runs.append(
            (
                weights(trainer),
                trainer.figures.tokens,
                trainer.figures.saved_for_backward_bytes,
                trainer.figures.evaluations,
            )
        )
    (before, *facts), (after, *facts_after) = runs
    assert facts == facts_after
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_everything_is_as_it_was(build: Build, config: Any) -> None:
    trainer, arguments = build(f"{EVALUATED} --lora --lora_dropout 0.5 --tokentune")
    before = weights(trainer), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    modes = [module.training for module in trainer.model.modules()]
    probe_memory(trainer, arguments, config)
    after = weights(trainer), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert torch.equal(before[1], after[1]) and before[2:] == after[2:]
    assert modes == [module.training for module in trainer.model.modules()]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None and trainer.figures.evaluations == []
    assert trainer.figures.saved_for_backward_bytes is None and trainer.figures.batch_shape is None


def test_rotary_embeddings_that_grow_with_the_longest_sequence_are_put_back(build: Build, config: Any) -> None:
    trainer, arguments = build("--global_batch_size 2")
    rotary = trainer.model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq.clone(), persistent=False)
    own, forward = rotary.inv_freq, rotary.forward

    def growing(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        rotary.register_buffer("inv_freq", rotary.inv_freq * 2, persistent=False)
        rotary.max_seq_len_cached = 10**6
        return output

    rotary.forward = growing
    cached, values = rotary.max_seq_len_cached, own.clone()
    probe_memory(trainer, arguments, config)
    assert rotary.inv_freq is own and torch.equal(own, values) and rotary.max_seq_len_cached == cached


# --- what it counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--gradient_accumulation_steps 2",
        "--tokentune --prefix_length 0.25 --gradient_checkpointing",
        "--lora --tokentune --prefix_length 0.25 --bf16",
        "--attn_implementation eager --lora",
    ],
)
def test_peak_is_that_of_the_estimate_and_below_the_generous_bound(words: str, build: Build, config: Any) -> None:
    rows = [{"input_ids": [5] * 64, "labels": [5] * 64} for _ in range(8)]
    trainer, arguments = build(f"--global_batch_size 8 {words}", rows=rows)
    batch, shape = longest_batch(trainer, arguments, trainer.args.per_device_train_batch_size)
    assert shape == (arguments.optimization.micro_batch_size, 64)
    peak = try_batch(trainer, arguments, batch)
    assert peak == pytest.approx(measure(config, arguments, shape, device="cpu").peak, rel=0.03)
    assert 2 * peak < generous_bytes(trainer.model, shape)


def test_longest_rows_make_the_batch(build: Build) -> None:
    trainer, arguments = build("--global_batch_size 3 --tokentune --prefix_length 0.5")
    batch, shape = longest_batch(trainer, arguments, 3)
    longest = sorted((len(row["input_ids"]) for row in make_rows(19)), reverse=True)[:3]
    assert batch["attention_mask"].sum(1).tolist() == longest and shape == (3, longest[0])
    assert batch["selected_positions"].shape == (3, longest[0] // 2)


@pytest.mark.parametrize("packing", ["", "--packing --max_length 64"])
def test_the_longest_answer_is_in_the_longest_row(build: Build, config: Any, packing: str) -> None:
    """Rows of 40 tokens with few targets and of 20 tokens with many: both meet in one micro-batch of training."""
    rows = [{"input_ids": [5] * 40, "labels": [-100] * 38 + [5] * 2} for _ in range(4)]
    rows += [{"input_ids": [5] * 20, "labels": [-100] * 5 + [5] * 15}]
    trainer, arguments = build(f"--global_batch_size 2 --tokentune --prefix_length answers {packing}", rows=rows)
    batch, shape = longest_batch(trainer, arguments, 2)
    length, most = (60, 17) if packing else (40, 15)
    assert shape == (2, length) and batch["selected_positions"].shape == (2, most)
    assert answer_share(trainer.train_dataset) == most / length
    found = measure(config, arguments, shape, device="cpu", answer_share=most / length)
    assert try_batch(trainer, arguments, batch) == pytest.approx(found.peak, rel=0.03)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_batch_that_runs_out_of_memory_is_told_with_what_would_fit(
    build: Build, config: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    trainer, arguments = build("--global_batch_size 8")
    before, forward = weights(trainer), trainer.model.model.forward

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    trainer.model.model.forward = full
    room = measure(config, arguments, (8, 24), device="cpu").peak // 2
    monkeypatch.setattr(memory_probe, "room_of", lambda trainer: room)
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 0)
    with pytest.raises(
        UserError, match=r"before training, with the longest micro-batch \(8 x 24 tokens\), whose step"
    ) as told:
        probe_memory(trainer, arguments, config)
    first, second = str(told.value).splitlines()
    assert "would save most" in first and "are available" in first
    assert second.startswith(("Any of these makes it fit: ", "No single flag makes it fit; together these do: "))
    said = capfd.readouterr().err
    assert "fits" in said and "--gradient_accumulation_steps 2" in said
    trainer.model.model.forward = forward
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_on_a_cpu_what_cannot_fit_is_not_tried(build: Build, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, arguments = build("--global_batch_size 8")
    monkeypatch.setattr(memory_probe, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(memory_probe, "out_of_memory", lambda run, when, **_: UserError(when))
    monkeypatch.setattr(memory_probe, "try_batch", lambda *_: pytest.fail("it was tried"))
    with pytest.raises(UserError, match=r"longest micro-batch \(8 x 24 tokens\)"):
        probe_memory(trainer, arguments, config)


def test_changes_are_combined_where_no_single_one_suffices() -> None:
    arguments, shape = parse_arguments(f"{REQUIRED} --global_batch_size 8".split()), (8, 64)

    def run(changed: Arguments, shape: tuple[int, int]) -> Any:
        """The peak halves with each of these flags and with the batch; --qlora has nothing more than --lora."""
        given = changed.selection.tokentune + changed.adapters.lora + changed.memory.gradient_checkpointing
        return SimpleNamespace(peak=shape[0] * shape[1] * 1000 // 2**given)

    now = run(arguments, shape)
    ranked = advice(arguments, shape, now.peak, run)
    assert {entry["peak"] for entry in ranked} == {now.peak // 2}
    for halves in range(2, 5):
        found = together(arguments, shape, ranked, run, int(1.03 * now.peak / 2**halves) + 1)
        assert found["peak"] == now.peak // 2**halves
        assert len(found["change"].split("--")) - 1 >= halves and "--qlora" not in found["change"]
    assert together(arguments, shape, ranked, run, 10) is None


REQUIRED = "--model_name_or_path owner/model --dataset_name_or_path owner/data --report_to none --skip_verification"


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Within it this process may take so many bytes of addresses more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_allocation_that_fails_is_told(build: Build, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"input_ids": [5] * 500, "labels": [5] * 500} for _ in range(256)]
    trainer, arguments = build("--global_batch_size 256", rows=rows)
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 0)  # it is tried
    told = []
    monkeypatch.setattr(memory_probe, "out_of_memory", lambda run, when, **_: told.append(when) or UserError(when))
    with address_space(200 * 2**20), pytest.raises(UserError, match=r"longest micro-batch \(256 x 500 tokens\)"):
        probe_memory(trainer, arguments, config)
    assert told


def test_limit_of_addresses_is_known() -> None:
    with address_space(100 * 2**20):
        assert 50 * 2**20 < available_bytes("cpu") <= 100 * 2**20


def test_limits_of_control_groups_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 10), (inner.parent, "5000", 2000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    old = tmp_path / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("9000\n")
    (old / "memory.usage_in_bytes").write_text("1000\n")
    lines = available_memory._lines
    groups = ["0::/outer/inner", "4:memory:/job", "3:cpu:/job"]
    monkeypatch.setattr(available_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(available_memory, "_lines", lambda path: groups if path.name == "cgroup" else lines(path))
    assert list(available_memory._cgroup_limits()) == [3300, 8000]
    assert available_bytes("cpu") == 3300


def test_validation_that_runs_out_of_memory_is_told(build: Build, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, arguments = build(EVALUATED)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "evaluation", full)
    with pytest.raises(UserError, match="before training, with the longest batch of the validation"):
        probe_memory(trainer, arguments, config)


def test_other_errors_are_left_alone(build: Build, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, arguments = build(EVALUATED)

    def broken(*_: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(trainer, "evaluation", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        probe_memory(trainer, arguments, config)
    assert probe_memory(*build(f"{EVALUATED} --skip_memory_probe"), config) is None


# --- the largest micro-batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", range(13))
def test_search_finds_the_largest_in_few_looks(largest: int) -> None:
    divisors, looked = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96], []
    fitting = divisors[:largest]
    found = last_that_fits(divisors, lambda count: looked.append(count) or count in fitting)
    assert found == (fitting[-1] if fitting else None)
    assert len(looked) == len(set(looked)) <= 8


@pytest.mark.parametrize("start", [0, 5, 11])
@pytest.mark.parametrize("largest", range(13))
def test_search_finds_the_largest_from_any_start(largest: int, start: int) -> None:
    looked = []
    found = last_that_fits(range(12), lambda value: looked.append(value) or value < largest, start)
    assert found == (largest - 1 if largest else None)
    assert len(looked) == len(set(looked)) <= 8
    if start == largest - 1:
        assert len(looked) <= 2  # the start, and the next


def test_micro_batch_that_fits_gives_the_same_update(
    build: Build, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--global_batch_size 12 --learning_rate 1e-2 --tokentune --prefix_length 0.3"
    trainer, arguments = build(f"{words} --auto_micro_batch", dtype=torch.float64)
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 0 if shape[0] <= 4 else 10**18)
    monkeypatch.setattr(memory_probe, "room_of", lambda trainer: 1000)
    assert choose_micro_batch(trainer, arguments, config) == 4
    assert trainer.args.per_device_train_batch_size == trainer.args.per_device_eval_batch_size == 4
    assert trainer.args.gradient_accumulation_steps == 3
    trainer.train()
    whole, _ = build(words, dtype=torch.float64)
    before = weights(whole)
    whole.train()
    assert trainer.state.global_step == whole.state.global_step == 2
    for name, tensor in weights(whole).items():
        update = tensor - before[name]
        torch.testing.assert_close(weights(trainer)[name] - before[name], update, rtol=1e-6, atol=1e-9, msg=name)


def test_micro_batch_is_tried_where_running_out_of_memory_is_told(
    build: Build, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    trainer, arguments = build("--global_batch_size 6 --auto_micro_batch")
    forward = trainer.model.model.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    trainer.model.model.forward = small
    assert try_batch(trainer, arguments, longest_batch(trainer, arguments, 6)[0]) is None
    monkeypatch.setattr(
        memory_probe,
        "_fits",
        lambda run, count: try_batch(trainer, arguments, longest_batch(trainer, arguments, count)[0]) is not None,
    )
    assert choose_micro_batch(trainer, arguments, config) == 3
    assert trainer.args.gradient_accumulation_steps == 2


def test_not_one_row_fits(build: Build, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, arguments = build("--global_batch_size 4 --auto_micro_batch")
    monkeypatch.setattr(memory_probe, "_fits", lambda *_: False)
    with pytest.raises(UserError, match=r"longest micro-batch \(1 x 24 tokens\)"):
        choose_micro_batch(trainer, arguments, config)


@pytest.mark.parametrize("asked", ["", "--skip_memory_probe", "--auto_micro_batch"])
def test_a_resumed_run_takes_its_checkpoint_s_micro_batch(
    asked: str, build: Build, config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = "--global_batch_size 6 --save_steps 1 --max_steps 1"
    trainer, arguments = build(f"{words} --auto_micro_batch")
    monkeypatch.setattr(memory_probe, "_fits", lambda run, count: count <= 2)
    choose_micro_batch(trainer, arguments, config)
    trainer.train()
    for name in ("_fits", "_fits_by_far"):
        monkeypatch.setattr(memory_probe, name, lambda *_: pytest.fail("it searched"))
    words = f"{words} {asked}"
    trainer, arguments = build(words)
    assert choose_micro_batch(trainer, arguments, config, tmp_path / "run" / "checkpoint-1") == 2
    assert trainer.args.gradient_accumulation_steps == 3


def test_without_a_flag_a_bound_decides_on_a_cpu(
    build: Build, config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An estimate takes seconds, and is made only where the bound lets not one row fit."""
    caplog.set_level("INFO")
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 0 if shape[0] <= 5 else 10**18)
    monkeypatch.setattr(memory_probe, "room_of", lambda trainer: 1000)
    monkeypatch.setattr(memory_probe, "_fits", lambda *_: pytest.fail("it estimated"))
    trainer, arguments = build("--global_batch_size 12")
    assert choose_micro_batch(trainer, arguments, config) == 4
    assert trainer.args.gradient_accumulation_steps == 3
    assert "auto: --gradient_accumulation_steps 3, 4 sequences in a micro-batch (looked at 12, 6, 3, 4)" in caplog.text
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 10**18)
    monkeypatch.setattr(memory_probe, "_fits", lambda run, count: count <= 2)
    assert choose_micro_batch(*build("--global_batch_size 12"), config) == 2
    assert choose_micro_batch(*build("--global_batch_size 12 --gradient_accumulation_steps 2"), config) == 6


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--optim_in_backward --max_grad_norm 0", "--optim_in_backward applies each gradient at once"),
        ("--streaming --max_steps 3", "--streaming makes its batches as it reads them"),
        ("--skip_memory_probe", "--skip_memory_probe"),
        ("", "a step of this model cannot be estimated; tried on a CPU it may end the process."),
    ],
)
def test_what_cannot_be_tried_is_one_micro_batch(
    words: str,
    reason: str,
    build: Build,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unknown(*_: Any) -> int:
        raise UserError("no kernel")

    caplog.set_level("INFO")
    monkeypatch.setattr(memory_probe, "generous_bytes", lambda model, shape: 10**18)
    monkeypatch.setattr(memory_probe, "estimated_peak", unknown)
    trainer, arguments = build(f"--global_batch_size 6 {words}")
    assert choose_micro_batch(trainer, arguments, config) == 6
    assert trainer.args.gradient_accumulation_steps == 1
    assert f"auto: --gradient_accumulation_steps 1, 6 sequences in a micro-batch ({reason})" in caplog.text
    if not words:
        with pytest.raises(UserError, match="--auto_micro_batch: a step of this model cannot be estimated"):
            choose_micro_batch(*build("--global_batch_size 6 --auto_micro_batch"), config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gradient_accumulation_steps 2", "leave --gradient_accumulation_steps out"),
        ("--optim_in_backward --max_grad_norm 0", "nothing to find beside --optim_in_backward"),
        ("--streaming --max_steps 3", "cannot change the batches of --streaming"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_arguments(f"{REQUIRED} --auto_micro_batch {words}".split())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tiny_llama_dir: Path, alpaca_file: Path, tmp_path: Path) -> list[str]:
    names = ["--model_name_or_path", str(tiny_llama_dir), "--dataset_name_or_path", str(alpaca_file)]
    words = "--global_batch_size 8 --max_length 64 --warmup_steps 0 --report_to none --data_cache none"
    return [*names, "--model_save_path", str(tmp_path / "models"), *words.split()]


def test_a_run_that_does_not_fit_leaves_nothing_behind(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_probe, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(memory_probe, "out_of_memory", lambda run, when, **_: UserError(when))
    with pytest.raises(UserError, match="before training, with the longest micro-batch"):
        finetune.main(command)
    assert not (tmp_path / "models").exists()


def test_summary_says_which_micro_batch_was_found(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_probe, "_fits", lambda run, count: count <= 5)
    finetune.main([*command, "--auto_micro_batch"])
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("models/*/training_summary.json"))
    assert summary["micro_batch_size"] == 4 and summary["optimizer_steps"] == 2
    assert summary["settings"]["auto_micro_batch"] is True
    assert summary["auto"] == {"gradient_accumulation_steps": 2, "logging_steps": 1}
    (settings,) = (path.read_text(encoding="utf-8") for path in tmp_path.glob("models/*/run.yaml"))
    assert "# auto came to --gradient_accumulation_steps 2 --logging_steps 1\n" in settings
    assert "gradient_accumulation_steps: auto\n" in settings  # so that the run is resumed by it


def test_weights_are_counted_once(build: Build) -> None:
    trainer, _ = build("--global_batch_size 4")
    held = sum(tensor.untyped_storage().nbytes() for tensor in weights_of(trainer.model))
    assert memory_probe.room_of(trainer) >= held
