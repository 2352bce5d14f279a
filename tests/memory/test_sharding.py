"""What each of several GPUs holds and sends: shares and traffic by hand, and the estimate's flags for them.

`test_distributed.py` holds the shares against FSDP's own, in several processes.
"""

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama_config
from estimates import arguments_of, config_file, report_of
from transformers import LlamaForCausalLM

from tokentune import estimate
from tokentune.core.layers import transformer_layers
from tokentune.errors import UserError
from tokentune.memory.accounting import REST, Footprint, LiveBytes
from tokentune.memory.footprint import measure

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 512}
CONFIG = tiny_llama_config(**SIZES)
HEAD = EMBEDDINGS = 512 * 128
LAYER = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320 + 2 * 128  # 2 of 4 key-value heads
ALL = 4 * LAYER + HEAD + EMBEDDINGS + 128
SELECTIVE = "--tokentune --prefix_length 0.3 --skip_verification"


def alone(words: str = "") -> Footprint:
    return measure(CONFIG, arguments_of(words), (2, 64))


def share(words: str, processes: int, engine: str) -> Footprint:
    return measure(CONFIG, arguments_of(words), (2, 64), processes=processes, engine=engine)


def test_ddp_holds_everything_and_reduces_gradients_once() -> None:
    one, several = alone("--gradient_accumulation_steps 4"), share("--gradient_accumulation_steps 4", 8, "ddp")
    assert (several.weights, several.optimizer) == (one.weights, one.optimizer)
    assert several.gradients == 2 * one.gradients
    assert several.sent == round(2 * 7 / 8 * 4 * ALL)
    assert several.peak >= one.peak + one.gradients


def test_fsdp_splits_all_and_gathers_the_weights_twice() -> None:
    several = share("", 8, "fsdp")
    assert several.weights == several.gradients == 4 * ALL // 8
    assert several.optimizer == pytest.approx(2 * several.weights, rel=0.01)
    assert several.sent == round(7 / 8 * 4 * (2 * (ALL - HEAD) + HEAD + ALL))
    assert share("--gradient_accumulation_steps 4", 8, "fsdp").sent == pytest.approx(4 * several.sent, abs=4)
    segments = share(f"--gradient_checkpointing --checkpoint_rest segments {SELECTIVE}", 8, "fsdp")
    assert segments.sent == round(7 / 8 * 4 * (3 * (ALL - HEAD) + HEAD + ALL))


def test_fsdp_in_16_bits_holds_float32_and_gathers_16_bits() -> None:
    several, plain = share("--bf16", 8, "fsdp"), share("", 8, "fsdp")
    assert several.weights == plain.weights
    assert several.optimizer == pytest.approx(plain.optimizer, rel=0.01)
    assert several.sent == round(7 / 8 * (2 * (2 * (ALL - HEAD) + HEAD) + 4 * ALL))
    assert several.activations < 0.6 * alone("--bf16").activations


def test_of_a_matrix_with_few_rows_each_process_holds_one() -> None:
    several = share("--lora --lora_r 8 --lora_target_modules down_proj", 64, "fsdp")
    # Of each layer's B (128, 8) two rows, of A (8, 320) one.
    assert several.gradients == 4 * 4 * (2 * 8 + 320)


def test_zero2_splits_states_and_gradients() -> None:
    words = "--gradient_accumulation_steps 4"
    one, several = alone(words), share(words, 4, "zero2")
    assert several.weights == one.weights
    assert several.gradients == pytest.approx(one.gradients / 4, abs=4)
    assert several.optimizer == pytest.approx(one.optimizer / 4, abs=4)
    assert several.sent == round(3 / 4 * 5 * one.gradients)
    mixed = share("--bf16", 4, "zero2")
    assert mixed.optimizer == pytest.approx(12 * ALL / 4, rel=0.01)  # masters, and Adam's two states
    assert mixed.weights == pytest.approx(2 * ALL, rel=0.01)


def test_peak_of_one_process_is_that_of_one_device() -> None:
    one, split = alone(), share("", 1, "fsdp")
    assert one.peak <= split.peak <= one.peak + one.weights  # what FSDP gathers is there besides
    more = [share("", processes, "fsdp").peak for processes in (1, 2, 8, 64)]
    assert more == sorted(more, reverse=True)


def test_at_peak_adds_up() -> None:
    for sharding in ("ddp", "zero2", "fsdp"):
        found = share("--bf16", 4, sharding)
        assert sum(found.at_peak.values()) == found.peak


def test_highest_by_hand() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        live.claim("kept", [kept])
        live.restart()
        live.begin("first")
        moment = kept + 1
        del moment
        live.begin("second")
        another = kept + 2
        live.claim("grown", [another])
    assert live.highest(lambda phase, sizes: dict(sizes))[0] == "first"
    factors = {"first": {REST: 0.5}, "second": {"grown": 2.0, "kept": 0.25}}

    def change(phase: str, sizes: dict[str, int]) -> dict[str, int]:
        return {kind: int(size * factors[phase].get(kind, 1.0)) for kind, size in sizes.items()} | {"more": 7}

    phase, sizes = live.highest(change)
    assert (phase, sizes["kept"], sizes["grown"], sizes["more"]) == ("second", 1000, 8000, 7)


def test_layers_that_fsdp_splits_by_are_those_that_are_patched() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    layers = transformer_layers(model).layers
    assert all(type(layer).__name__ in model._no_split_modules for layer in layers)
    assert sum(p.numel() for p in layers[0].parameters()) == LAYER


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_file(tmp_path, **SIZES)


def test_table_for_several_gpus(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = report_of(tmp_path, config, "--max_length", 64, "--num_processes", 8, "--sharding", "fsdp")
    out = " ".join(capsys.readouterr().out.split())
    assert "each of 8 GPUs with FSDP" in out and "sent per step" in out
    assert "FSDP leaves 4-bit weights whole" in out
    assert (report["settings"]["processes"], report["settings"]["sharding"]) == (8, "fsdp")
    rows = {(row["weights"], row["method"]): row["bytes"] for row in report["rows"]}
    assert rows["QLoRA", "full"] is None
    assert rows["all weights", "full"]["sent"] > rows["LoRA", "full"]["sent"] > 0


def test_batch_is_shared(config: Path, tmp_path: Path) -> None:
    words = ("--global_batch_size", 16, "--gradient_accumulation_steps", 2, "--max_length", 32, "--only")
    report = report_of(tmp_path, config, *words, "--num_processes", 4)["settings"]
    assert (report["sequences"], report["sharding"]) == (2, "ddp")


def test_finds_the_longest_sequence(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words, memory = (config, "--find", "length", "--lora", "--memory"), 0.875
    assert report_of(tmp_path, *words, 1.2)["find"]["length"] == 512
    assert "1 x 512 tokens (the model was made for at most 512 positions)" in capsys.readouterr().out
    tokens = report_of(tmp_path, *words, memory)["find"]["length"]
    out = capsys.readouterr().out
    assert f"1 x {tokens} tokens" in out and "positions" not in out
    for length, fits in ((tokens, True), (tokens + 128, False)):
        assert estimate.fits_card(measure(CONFIG, arguments_of("--lora"), (1, length)).peak, memory) is fits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sharding fsdp", "--sharding fsdp is about several GPUs: add --num_processes"),
        ("--num_processes 0", "must be 1 or more"),
        ("--num_processes 8 --global_batch_size 12", "cannot be shared by --num_processes 8"),
        ("--find length", "--find length needs the size of the card"),
    ],
)
def test_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        estimate.main(["--model_name_or_path", "llama-3-70b", *words.split()])
    assert message in str(caught.value)
