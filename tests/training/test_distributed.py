"""Several processes against one: DistributedDataParallel and FSDP2 on CPUs (gloo), and what a launcher may not ask for.

All cases of one number of processes run in the same ones, started once (`distributed_worker.py`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from distributed_worker import (
    FSDP_2,
    GLOBAL_BATCH,
    ROWS,
    ZERO_2,
    ZERO_3,
    Case,
    case_file,
    figures_of,
    train,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tokentune.cli.arguments import parse_arguments
from tokentune.errors import UserError
from tokentune.memory.footprint import measure
from tokentune.processes import DDP, DEEPSPEED, FSDP, engine
from tokentune.training.distributed.engines import EvenSampler, check_checkpoint
from tokentune.training.distributed.peers import lost_peer

ROOT = Path(__file__).resolve().parents[2]
SELECTIVE = "--tokentune --prefix_length 0.3 --skip_verification"
LORA = f"{SELECTIVE} --lora --lora_dropout 0"
CASES = {  # {processes: {name: case}}
    2: {
        "ddp": Case(SELECTIVE, accumulation=3, eval_rows=5),
        "ddp_lora": Case(LORA, save=True),
        "ddp_corrected": Case(f"{SELECTIVE} --selection random --gradient_correction 1", accumulation=3),
        "fsdp": Case(f"{SELECTIVE} --save_steps 1", fsdp=True, accumulation=3, eval_rows=5, save=True),
        "fsdp_checkpointing": Case(f"{SELECTIVE} --gradient_checkpointing", fsdp=True, eval_rows=1),
        "fsdp_segments": Case(f"{SELECTIVE} --gradient_checkpointing --checkpoint_rest segments", fsdp=True, tied=True),
        "fsdp_lora": Case(f"{LORA} --gradient_checkpointing", fsdp=True, save=True),
    },
    4: {
        "ddp": Case(SELECTIVE),
        "fsdp_lora": Case(LORA, fsdp=True, accumulation=3, eval_rows=3),
        "fsdp_resumed": Case(SELECTIVE, fsdp=True, accumulation=3, eval_rows=5, resume="2/fsdp/checkpoint-1"),
    },
}
ALL = [(processes, name) for processes, cases in CASES.items() for name in cases]


class Launched:
    """What came of the cases of a number of processes."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder / str(processes), processes

    def weights(self, name: str) -> dict[str, Tensor]:
        return torch.load(self.folder / f"{name}.pt", weights_only=True)

    def figures(self, name: str) -> list[dict[str, Any]]:
        """Of each process."""
        files = [self.folder / f"{name}-{rank}.json" for rank in range(self.processes)]
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def launched(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Launched]:
    """All cases, run once; asked for those of a number of processes."""
    return launch(CASES, tmp_path_factory.mktemp("launched"), tiny_llama_dir)


def launch(cases: dict[int, dict[str, Case]], folder: Path, model_dir: Path) -> Callable[[int], Launched]:
    worker = ROOT / "tests" / "distributed_worker.py"
    words = [sys.executable, worker, case_file(cases, folder / "cases.json"), folder, model_dir]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return partial(Launched, folder)


@pytest.fixture(scope="module")
def alone(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """A case in this process, in micro-batches as large as those of one process of several: (trainer, drawn)."""
    known: dict[str, tuple] = {}

    def run(case: Case, processes: int) -> tuple:
        name = f"{case.words} {case.tied} {case.eval_rows} {case.accumulation * processes}"
        if name not in known:
            parts = {"accumulation": case.accumulation * processes, "tied": case.tied, "eval_rows": case.eval_rows}
            folder = tmp_path_factory.mktemp("alone")
            known[name] = train(Case(case.words, **parts), str(tiny_llama_dir), folder, "run")
        return known[name]

    return run


@pytest.mark.parametrize(("processes", "name"), ALL, ids=lambda value: str(value))
def test_same_as_one_process(processes: int, name: str, launched: Callable, alone: Callable) -> None:
    case = CASES[processes][name]
    several, (one, drawn) = launched(processes), alone(case, processes)
    expected, found = weights_of(one), several.weights(name)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-9, atol=1e-12, msg=key)

    figures, figures_alone = several.figures(name), figures_of(one, drawn)
    assert all(of_rank["split"] is case.fsdp for of_rank in figures)
    for of_rank in figures:
        assert of_rank["losses"] == pytest.approx(figures_alone["losses"], rel=1e-6)  # the Trainer sums in float32
        assert of_rank["gradient_norms"] == pytest.approx(figures_alone["gradient_norms"], rel=1e-6)
        # Each validation row counts once, also where a process has one less, or none.
        assert of_rank["evaluations"] == pytest.approx(figures_alone["evaluations"], rel=1e-6)
        assert len(of_rank["evaluations"]) == (2 if case.eval_rows else 0)
        assert of_rank["tokens"]["selected_supervised"] == one.figures.tokens["selected_supervised"]
    # The first process's first micro-batch is that of the run alone.
    assert case.resume or figures[0]["saved_for_backward_bytes"] == figures_alone["saved_for_backward_bytes"]


def test_draws_differ_between_processes_and_depend_on_the_row_alone(launched: Callable, alone: Callable) -> None:
    case = CASES[2]["ddp"]
    size = GLOBAL_BATCH // case.accumulation // 2
    first, second = (figures["drawn"] for figures in launched(2).figures("ddp"))
    epoch = [row for start in range(0, len(first), size) for part in (first, second) for row in part[start:][:size]]
    _, drawn = alone(case, 2)
    assert epoch[:ROWS] == drawn[:ROWS]  # of the first epoch
    assert first[: ROWS // 2] != second[: ROWS // 2]
    assert epoch[ROWS][0] == 0  # of the row that fills the last batch up: its only token


ZERO = {  # of two processes
    f"zero{stage}{name}": Case(words, environment=environment, **parts)
    for stage, environment in ((2, ZERO_2), (3, ZERO_3))
    for name, words, parts in (
        ("", SELECTIVE, {"accumulation": 3, "eval_rows": 5}),
        ("_lora", LORA, {}),
        ("_segments", f"{SELECTIVE} --gradient_checkpointing --checkpoint_rest segments", {}),
    )
}


@pytest.fixture(scope="module", params=[2, 3])
def launched_by_deepspeed(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Launched]:
    """A stage, and its cases: each stage in processes of its own, where accelerate keeps the first one's settings."""
    if not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed")
    stage = f"zero{request.param}"
    cases = {f"{stage}{name}": ZERO[f"{stage}{name}"] for name in ("", "_lora", "_segments")}
    return stage, launch({2: cases}, tmp_path_factory.mktemp(stage), tiny_llama_dir)(2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "_lora", "_segments"])
def test_deepspeed_gets_as_far_as_one_process(kind: str, launched_by_deepspeed: tuple, alone: Callable) -> None:
    """Its gradients and AdamW's states are in float32, which one process's are as far from float64."""
    stage, several = launched_by_deepspeed
    case = ZERO[stage + kind]
    one, drawn = alone(case, 2)
    expected, found = weights_of(one), several.weights(stage + kind)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # ZeRO-3 holds float32 weights. A step moves them by 1e-2.
        torch.testing.assert_close(found[key].to(weight.dtype), weight, rtol=0, atol=2e-4, msg=key)
    figures_alone = figures_of(one, drawn)
    for of_rank in several.figures(stage + kind):
        assert of_rank["losses"] == pytest.approx(figures_alone["losses"], rel=1e-6)
        assert of_rank["gradient_norms"] == pytest.approx(figures_alone["gradient_norms"], rel=1e-6)
        assert of_rank["evaluations"] == pytest.approx(figures_alone["evaluations"], rel=1e-6)


@pytest.mark.parametrize(("processes", "name"), [(2, "fsdp"), (2, "fsdp_lora"), (4, "fsdp_lora")])
def test_bytes_of_the_parts_are_those_of_the_estimate(
    processes: int, name: str, launched: Callable, tiny_llama_dir: Path
) -> None:
    flags = CASES[processes][name].words
    words = f"--model_name_or_path {tiny_llama_dir} --dataset_name_or_path none --report_to none {flags}"
    config, arguments = AutoConfig.from_pretrained(tiny_llama_dir), parse_arguments(words.split())
    share = measure(config, arguments, (1, 16), processes=processes, engine="fsdp", device="cpu")
    for figures in launched(processes).figures(name):  # in float64, twice the estimate's float32
        assert figures["weight_bytes"] / 2 == pytest.approx(share.weights, rel=0.02)
        assert figures["trained_bytes"] / 2 == pytest.approx(share.gradients, rel=0.02)
        assert figures["state_bytes"] / 2 == pytest.approx(share.optimizer, rel=0.02)


def test_what_is_saved_is_what_one_process_saves(launched: Callable, alone: Callable) -> None:
    several = launched(2)
    whole = AutoModelForCausalLM.from_pretrained(several.folder / "fsdp")
    assert (type(whole).__name__, whole.dtype) == ("LlamaForCausalLM", torch.float64)
    weights = several.weights("fsdp")
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.state_dict().items())
    config = json.loads((several.folder / "fsdp" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float64"
    assert several.figures("fsdp")[1]["facts"]["class"] == "LlamaForCausalLM"
    adapters = [load_file(several.folder / name / "adapter_model.safetensors") for name in ("ddp_lora", "fsdp_lora")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name].double(), weight.double(), rtol=1e-6, atol=1e-8, msg=name)


# ---- small parts -----------------------------------------------------------------------------------------------------


def test_last_batch_is_filled_with_rows_that_do_not_count() -> None:
    sampler = EvenSampler(SeedableRandomSampler(range(10), data_seed=3), together=4)
    order = list(sampler)
    assert sorted(order[:10]) == list(range(10)) and order[10:] == [None, None]
    assert len(sampler) == 12
    again = EvenSampler(SeedableRandomSampler(range(10), data_seed=3), together=4)
    again.set_epoch(1)
    assert list(again)[:10] != order[:10]
    assert len(EvenSampler(range(8), together=4)) == 8


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2"}, DDP),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, FSDP),
        ({"ACCELERATE_USE_FSDP": "true"}, FSDP),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, DEEPSPEED),
    ],
)
def test_engine_of_the_launcher(environment: dict, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine() == expected


REFUSED = {
    "model_parallel": ({"WORLD_SIZE": "2"}, "--model_parallel", "gives each process a GPU of its own"),
    "optim_in_backward": (
        {"WORLD_SIZE": "2"},
        "--optim_in_backward --max_grad_norm 0",
        "cannot average gradients over processes",
    ),
    "zero_3_qlora": (ZERO_3, "--qlora", "--qlora with DeepSpeed ZeRO-3"),
    "zero_3_chunks": (ZERO_3, f"{SELECTIVE} --chunked_loss on", "different numbers of chunks"),
    "qlora": (FSDP_2, "--qlora", "--qlora: FSDP would leave the 4-bit weights whole"),
    "optimizer": (FSDP_2, "--optim adafactor", "--optim adafactor has not been shown to work on weights that FSDP"),
    "fsdp_1": (FSDP_2 | {"FSDP_VERSION": "1"}, "", "FSDP 1 flattens"),
    "fsdp_checkpointing": (FSDP_2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "give --gradient_checkpointing"),
    "fsdp_by_size": (FSDP_2 | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "", "TRANSFORMER_BASED_WRAP"),
    "tensor_parallel": (
        {"WORLD_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        "",
        "tensor, context or sequence parallelism",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, words, message = REFUSED[case]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = f"--model_name_or_path no/such --dataset_name_or_path none.jsonl --report_to none {words}"
    with pytest.raises(UserError, match=message):
        parse_arguments(command.split())


@pytest.mark.parametrize(("environment", "name"), [(FSDP_2, "FSDP"), (ZERO_2, "DeepSpeed")])
def test_an_engine_without_accelerators_is_refused(
    environment: dict, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{name} needs accelerators"):
        parse_arguments(["--model_name_or_path", "no/such", "--dataset_name_or_path", "none.jsonl"])


def test_a_checkpoint_is_gone_on_from_with_its_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    whole.mkdir()
    (parts / "pytorch_model_fsdp_0").mkdir(parents=True)
    check_checkpoint(whole)
    with pytest.raises(UserError, match="was written by FSDP, and cannot be gone on from without it"):
        check_checkpoint(parts)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_checkpoint(parts)
    with pytest.raises(UserError, match="was written without FSDP"):
        check_checkpoint(whole)


def test_deepspeed_goes_on_with_as_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    for rank in range(2):
        (checkpoint / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(UserError, match="was written by DeepSpeed, and cannot be gone on from without it"):
        check_checkpoint(checkpoint)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_checkpoint(checkpoint)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="written by 2 processes of DeepSpeed, which cannot go on from it with 4"):
        check_checkpoint(checkpoint)


def test_a_lost_peer_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert lost_peer(error) is None  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process of this run has ended" in lost_peer(error)
    assert lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
