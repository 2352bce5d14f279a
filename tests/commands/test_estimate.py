"""The estimate against measured bytes of real models on the CPU, what it finds, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert_config, tiny_llama_config
from estimates import arguments_of, config_file, report_of
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tokentune import estimate
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.errors import UserError
from tokentune.memory import estimate_table
from tokentune.memory.accounting import FRAGMENTATION, Footprint, LiveBytes, states_of, weights_of
from tokentune.memory.fake_device import fake_device, run_backward, to_fake
from tokentune.memory.footprint import measure
from tokentune.memory.largest import predicted_start
from tokentune.memory.presets import load_subject
from tokentune.memory.shallow import predicted, why_not_predictable, with_depth
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.tasks import CAUSAL_LM, TEXT
from tokentune.settings.finetune import Arguments

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, TOKENS = 2, 128
MOST_OF_ROWS = 55  # selected tokens: 999 of 1000 rows of 128 tokens select no more at a proportion of 0.3
SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 2000}
TRAINED = {"all weights": "", "LoRA": "--lora", "QLoRA": "--qlora"}
METHODS = {
    "full": "",
    "gradient checkpointing": "--gradient_checkpointing",
    "TokenTune": "--tokentune --prefix_length 0.3 --skip_verification",
    "TokenTune + checkpointing": "--tokentune --prefix_length 0.3 --skip_verification --gradient_checkpointing",
    "corrected": "--tokentune --prefix_length 0.3 --skip_verification --selection random --gradient_correction 1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2.4 million weights with grouped heads."""
    path = tmp_path_factory.mktemp("models") / "small-llama"
    LlamaForCausalLM(tiny_llama_config(**SIZES)).to(torch.bfloat16).save_pretrained(path)
    return path


def measured(arguments: Arguments) -> Footprint:
    """A step of the real model on real tensors, its live storages counted."""
    config = AutoConfig.from_pretrained(arguments.model.model_name_or_path)
    model = prepare_model(arguments, base_dtype(arguments, config)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ids = torch.randint(3, 1990, (SEQUENCES, TOKENS))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if arguments.selection.tokentune:
        corrected = arguments.selection.gradient_correction > 0
        count = MOST_OF_ROWS if corrected else round(arguments.selection.selected * TOKENS)
        batch["selected_positions"] = torch.rand(SEQUENCES, TOKENS).argsort(1)[:, :count].sort(1).values
        if corrected:
            known = torch.full((SEQUENCES, count), arguments.selection.selected)
            batch |= {"selection_probabilities": known, "selection_weights": 1 / known}
    with LiveBytes("cpu") as live:
        live.claim("weights", weights_of(model))
        live.claim("optimizer", states_of(optimizer))
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.model.bf16), SavedForBackward(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        gradients = sum(parameter.grad.nbytes for parameter in trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return Footprint(
        weights=sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in weights_of(model)}.values()),
        gradients=gradients,
        optimizer=sum(tensor.nbytes for tensor in states_of(optimizer)),
        activations=saved.bytes,
        peak=live.peak,
        peak_phase=live.peak_phase,
        at_peak=live.at_peak(),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", TRAINED)
def test_within_two_percent_of_measured_bytes(folder: Path, trained: str, method: str) -> None:
    arguments = arguments_of(f"{TRAINED[trained]} {METHODS[method]}", folder)
    found = measure(AutoConfig.from_pretrained(folder), arguments, (SEQUENCES, TOKENS), device="cpu")
    real = measured(arguments)
    for name in ("weights", "gradients", "optimizer", "activations", "peak"):
        assert getattr(found, name) == pytest.approx(getattr(real, name), rel=0.02), name
    assert sum(found.at_peak.values()) == found.peak
    assert sum(found.activations_by.values()) == found.activations


@pytest.mark.parametrize("method", ["full", "TokenTune"])
def test_within_two_percent_under_mixed_precision(folder: Path, method: str) -> None:
    arguments = arguments_of(f"--bf16 {METHODS[method]}", folder)
    found = measure(AutoConfig.from_pretrained(folder), arguments, (SEQUENCES, TOKENS), device="cpu")
    real = measured(arguments)
    assert found.activations == pytest.approx(real.activations, rel=0.02)
    assert found.activations_by["weights in 16 bits"] > 0.2 * found.activations


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_attention_heads=4, num_key_value_heads=4),
    "qwen3": Qwen3MoeConfig(**SIZES, **EXPERTS, num_attention_heads=4, num_key_value_heads=4),
}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize(
    "words", ["", "--lora --lora_target_modules q_proj", "--lora --lora_target_modules all-linear"]
)
def test_mixtures_of_experts_keep_what_is_measured(family: str, words: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(MIXTURES[family]).save_pretrained(tmp_path)
    arguments = arguments_of(f"{words} {METHODS['TokenTune']}", tmp_path)
    found = measure(AutoConfig.from_pretrained(tmp_path), arguments, (SEQUENCES, TOKENS), device="cpu")
    real = measured(arguments)
    for name in ("weights", "gradients", "activations"):
        assert getattr(found, name) == pytest.approx(getattr(real, name), rel=0.02), name


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_need_no_gpu(family: str) -> None:
    """transformers asks the GPU that is not there which products it can do; float32 and 16 bits alike."""
    for words in ("", "--bf16 --lora --lora_target_modules all-linear"):
        found = measure(MIXTURES[family], arguments_of(words), (SEQUENCES, TOKENS), device="cuda")
        experts = sum(p.numel() for name, p in made(MIXTURES[family]).named_parameters() if ".experts." in name)
        assert found.weights > experts * (2 if words else 4)
        assert found.peak > found.weights + found.activations


def made(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_a_gpu_keeps_what_the_cpu_keeps_where_both_have_the_same_kernels() -> None:
    # Without grouped heads and in 16 bits both take flash attention. The casts of the fake GPU are this project's own,
    # those of the CPU torch's.
    config = tiny_llama_config(**SIZES, num_key_value_heads=4)
    arguments = arguments_of("--bf16")
    gpu, cpu = (measure(config, arguments, (SEQUENCES, TOKENS), device=device) for device in ("cuda", "cpu"))
    assert gpu.activations == pytest.approx(cpu.activations, rel=0.002)
    assert gpu.activations_by.keys() == cpu.activations_by.keys()


def test_fake_tensors_tell_their_device_and_leave_no_trace() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama_config())
    before = torch.Tensor._make_subclass, torch.cuda.Stream, torch.clear_autocast_cache
    with fake_device("cuda"):
        to_fake(model, "cuda", torch.float32)
        ids = torch.ones(1, 8, dtype=torch.int64, device="cuda")
        loss = model(input_ids=ids, labels=ids).loss
        run_backward(loss)
        assert loss.device.type == "cuda"
        assert model.lm_head.weight.grad.device.type == "cuda"
    assert before == (torch.Tensor._make_subclass, torch.cuda.Stream, torch.clear_autocast_cache)
    assert torch.ones(2).sum() == 2


def test_live_bytes_by_hand() -> None:
    with LiveBytes() as live:
        one = torch.zeros(1000)
        live.claim("kept", [one])
        live.begin("sum")
        two = one + 1
        view = two[:10]
        del two  # its storage lives on in the view
        assert live.now == 8000
        del view
        assert (live.now, live.peak, live.peak_phase) == (4000, 8000, "sum")
        assert live.at_peak() == {"kept": 4000, "rest": 4000}


@pytest.mark.parametrize(
    ("optim", "bytes_per_weight"),
    [("adamw_torch", 8), ("sgd", 0), ("adamw_torch_fused", 8), ("adafactor", 0), ("adamw_bnb_8bit", 2)],
)
def test_states_of_the_chosen_optimizer(optim: str, bytes_per_weight: int) -> None:
    sizes = {**SIZES, "vocab_size": 32}  # the embeddings, in 32 bits always, shall not matter
    arguments = arguments_of(f"--optim {optim}")
    found = measure(tiny_llama_config(**sizes), arguments, (1, 16))
    assert found.optimizer == pytest.approx(bytes_per_weight * found.weights / 4, rel=0.05, abs=0.03 * found.weights)


def test_gradients_applied_in_the_backward_pass_are_not_held() -> None:
    words = "--optim_in_backward --global_batch_size 1 --max_grad_norm 0"
    config = tiny_llama_config(**SIZES)
    found = measure(config, arguments_of(words), (1, 16))
    held = measure(config, arguments_of(""), (1, 16))
    assert (found.gradients, held.gradients) == (0, pytest.approx(held.weights, rel=0.01))
    assert found.optimizer == held.optimizer
    assert found.peak < held.peak - 0.5 * held.weights


def test_encoders_are_estimated_too() -> None:
    config = tiny_bert_config(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_labels=2)
    plain = measure(config, arguments_of(""), (4, 64), head=TEXT)
    words = "--tokentune --prefix_length 0.25"
    selective = measure(config, arguments_of(words), (4, 64), head=TEXT)
    assert plain.weights == selective.weights
    assert 0.25 < selective.activations / plain.activations < 0.5
    words += " --qlora --lora_target_modules all-linear"
    quantized = measure(config, arguments_of(words), (4, 64), head=TEXT)
    assert quantized.weights < 0.7 * plain.weights


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_file(tmp_path, **SIZES)


def test_table_of_all_modes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = report_of(tmp_path, config, "--max_length", 64, "--lora", "--tokentune")
    out = capsys.readouterr().out
    rows = {(row["weights"], row["method"]): row for row in report["rows"]}
    assert len(rows) == 18
    assert [key for key, row in rows.items() if row["chosen"]] == [("LoRA", "TokenTune")]
    assert all(row["reason"] is None and row["fits_gb"] == [16, 24, 40, 48, 80, 141] for row in rows.values())
    for trained in estimate.WEIGHTS:
        kept = {method: rows[trained, method]["bytes"]["activations"] for method in estimate.METHODS}
        assert kept["TokenTune + checkpointing"] < kept["gradient checkpointing"] < kept["full"]
        assert kept["TokenTune"] < 0.5 * kept["full"]
        assert kept["gradient checkpointing + chunked loss"] < kept["gradient checkpointing"]
        assert kept["plain, chunked loss"] < kept["full"]
    assert rows["QLoRA", "full"]["bytes"]["weights"] < rows["LoRA", "full"]["bytes"]["weights"]
    assert out.count("TokenTune") > 5 and "TokenTune *" in out
    assert report["settings"]["tokens"] == 64


def test_rows_of_ordinary_training_do_not_depend_on_flags_of_others(config: Path, tmp_path: Path) -> None:
    chosen = []

    def peaks(*words: object) -> dict[tuple[str, str], int]:
        rows = report_of(tmp_path, config, "--max_length", 64, *words)["rows"]
        chosen.append([(row["weights"], row["method"]) for row in rows if row["chosen"]])
        return {(row["weights"], row["method"]): row["bytes"]["peak"] for row in rows}

    words = ("--selection", "attention", "--selection_layers", 1, "--prefix_length", "0.1:0.5")
    words += ("--chunked_loss", "off")
    plain, others = peaks(), peaks(*words)
    in_chunks = peaks("--prefix_length", "1.0", "--chunked_loss", "on")
    assert chosen == [[("all weights", "full")]] * 2 + [[("all weights", "plain, chunked loss")]]
    for trained in estimate.WEIGHTS:
        for method in (name for name, flags in estimate.METHODS.items() if not flags["tokentune"]):
            assert plain[trained, method] == others[trained, method] == in_chunks[trained, method]
        for method, same in (("plain", "TokenTune"), ("gradient checkpointing", "TokenTune + checkpointing")):
            name = next(name for name in estimate.METHODS if name.startswith(method) and "chunked" in name)
            assert plain[trained, name] == pytest.approx(in_chunks[trained, same], rel=0.02)  # all tokens selected
    assert plain["LoRA", "TokenTune"] != others["LoRA", "TokenTune"]


def test_encoders_have_no_rows_with_a_chunked_loss(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.json"
    tiny_bert_config(architectures=["BertForMaskedLM"]).to_json_file(path)
    report_of(tmp_path, path, "--max_length", 32)
    out = capsys.readouterr().out
    assert "TokenTune + checkpointing" in out and "chunked" not in out


def test_only_the_chosen_mode(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report_of(tmp_path, config, "--max_length", 64, "--qlora", "--only", "--bf16")
    out = capsys.readouterr().out
    assert "QLoRA" in out and "LoRA" not in out.replace("QLoRA", "") and "TokenTune │" not in out


def test_a_refused_model_keeps_its_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.json"
    sizes = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    path.write_text(json.dumps(sizes | {"architectures": ["BloomForCausalLM"]}))
    report_of(tmp_path, path, "--max_length", 32, "--lora_target_modules", "all-linear")
    out = capsys.readouterr().out
    assert "TokenTune cannot serve this model exactly: BloomForCausalLM has no layers" in " ".join(out.split())
    assert out.count("[1]") >= 6  # every TokenTune row, and the reason


def test_finds_the_largest_batch_and_proportion(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = (config, "--max_length", 256)
    found = report_of(tmp_path, *common, "--find", "batch", "--memory", 1.2)["find"]
    assert f"{found['batch']} sequences of 256 tokens" in capsys.readouterr().out
    model, arguments = AutoConfig.from_pretrained(config), arguments_of()
    for sequences, fits in ((found["batch"], True), (found["batch"] + 1, False)):
        assert estimate.fits_card(measure(model, arguments, (sequences, 256)).peak, 1.2) is fits
    words = ("--tokentune", "--find", "proportion", "--global_batch_size", found["batch"] + 3, "--memory", 1.2)
    assert 0.05 <= report_of(tmp_path, *common, *words)["find"]["proportion"] < 1.0


def test_largest_asks_few_times() -> None:
    asked = []

    def step(value: int) -> Footprint:
        asked.append(value)
        return Footprint(0, 0, 0, 0, value * 10**9, "forward", {})

    best, footprint, count = estimate.largest(range(1, 1001), step, 100.0)
    reserve = 100e9 - estimate_table.RESERVE_BYTES
    assert best == int(reserve / 1e9 / (1 + FRAGMENTATION)) == footprint.peak // 10**9
    assert count == len(asked) < 16
    assert estimate.largest(range(200, 300), step, 100.0)[0] is None
    assert estimate.largest(range(1, 50), step, 100.0)[0] == 49


# --- from a prediction ------------------------------------------------------------------------------------------------

DEEP = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7, "max_position_embeddings": 4096}
MODES = {
    "LoRA": "--lora",
    "QLoRA": "--qlora --tokentune --prefix_length 0.3",
    "checkpointing": "--lora --gradient_checkpointing",
    "all weights": "--tokentune --prefix_length 0.3 --gradient_checkpointing",
}


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_sequence_is_that_of_a_search_through_its_neighbours(mode: str, tmp_path: Path) -> None:
    config, path = tiny_llama_config(**DEEP, architectures=["LlamaForCausalLM"]), tmp_path / "deep.json"
    config.to_json_file(path)
    arguments = arguments_of(f"{MODES[mode]} --skip_verification --bf16")
    peaks = {length: measure(config, arguments, (1, length)).peak for length in range(512, 897, 128)}
    between = (peaks[640] + peaks[768]) / 2
    words = (*MODES[mode].split(), "--bf16", "--find", "length", "--memory")
    memory = (between * (1 + FRAGMENTATION) + estimate_table.RESERVE_BYTES) / 1e9
    found = report_of(tmp_path, path, *words, f"{memory:.9f}")["find"]
    assert found["length"] == max(length for length, peak in peaks.items() if estimate.fits_card(peak, memory)) == 640
    assert found["bytes"]["peak"] == peaks[640]
    assert found["steps_run"] == 2  # with all layers: one that fits, one that does not


def test_no_length_beyond_the_positions_and_none_below_the_shortest(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.json"
    tiny_llama_config(**DEEP | {"max_position_embeddings": 1000}, architectures=["LlamaForCausalLM"]).to_json_file(path)
    estimate.main(["--model_name_or_path", str(path), *["--lora", "--find", "length", "--memory", "80"]])
    told = capsys.readouterr()
    assert "1 x 896 tokens (the model was made for at most 1000 positions)" in told.out
    assert "predicted from few layers" in told.err and "tokens 896" in told.err and "all layers, fits" in told.err
    with pytest.raises(UserError, match="not even tokens 128 fits"):
        estimate.main(["--model_name_or_path", str(path), *["--lora", "--find", "length", "--memory", "0.86"]])


def test_few_layers_predict_all_where_these_are_alike() -> None:
    config = tiny_llama_config(**DEEP)
    arguments = arguments_of(f"--bf16 --lora {METHODS['TokenTune + checkpointing']}")
    found = predicted(config, lambda depth: measure(with_depth(config, depth), arguments, (1, 512)).peak)
    assert found == pytest.approx(measure(config, arguments, (1, 512)).peak, abs=40_000)
    assert why_not_predictable(config, arguments, CAUSAL_LM) is None
    segments = arguments.changed(checkpoint_rest="segments")
    assert "segments" in why_not_predictable(config, segments, CAUSAL_LM)
    dense_first = Qwen3MoeConfig(**DEEP | EXPERTS, mlp_only_layers=[0], num_attention_heads=4, num_key_value_heads=4)
    kinds = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    mixed = Qwen3Config(**DEEP, layer_types=kinds, num_attention_heads=4, num_key_value_heads=4)
    for differing in (dense_first, mixed):
        assert why_not_predictable(differing, arguments, CAUSAL_LM) == "the layers differ"


@pytest.mark.parametrize("answer", [0, 1, 14, 15, 16, 100, 998, 999])
@pytest.mark.parametrize("flat", [0, 200])
def test_the_start_is_the_answer_of_the_predictions_within_few(answer: int, flat: int) -> None:
    asked = []

    def peak(value: int) -> float:
        asked.append(value)
        return 10**9 + max(0, value - flat) ** 1.5 * 1000

    most = peak(answer + 0.5) if answer < 999 else 1e12
    memory = (most * (1 + FRAGMENTATION) + estimate_table.RESERVE_BYTES) / 1e9
    start = predicted_start(range(1000), peak, memory)
    assert len(asked) <= 12
    if not flat:
        assert abs(start - answer) <= 1


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_take_what_as_many_tokens_take(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = (folder, "--device", "cpu", "--tokentune", "--only", "--max_length", "128")
    bytes_of = [
        report_of(tmp_path, *common, *words.split())["rows"][0]["bytes"]
        for words in (
            "--prefix_length 32",
            "--prefix_length answers --answer_share 0.25",
            "--prefix_length answers+0.25 --answer_share 0.25",
            "--prefix_length 56",
        )
    ]
    assert bytes_of[0] == bytes_of[1] and bytes_of[2] == bytes_of[3]
    assert bytes_of[1]["activations"] < bytes_of[2]["activations"]


def test_answers_of_data_are_the_longest_in_the_longest_row(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": "a " * 20, "completion": "b " * 2}, {"prompt": "a " * 5, "completion": "b " * 9}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = (tiny_llama_dir, "--device", "cpu", "--tokentune", "--only", "--data_cache", "none")
    found = report_of(tmp_path, *common, "--prefix_length", "answers", "--dataset_name_or_path", data)
    said = capsys.readouterr().err
    rows_said, longest, most = (
        int(number) for number in re.search(r"(\d+) rows of .* (\d+) tokens, .* (\d+) of", said).groups()
    )
    assert rows_said == 2 and found["settings"]["tokens"] == longest > most
    words = ("--prefix_length", most, "--max_length", longest)
    assert report_of(tmp_path, *common, *words)["rows"][0]["bytes"] == found["rows"][0]["bytes"]


REFUSED = [
    ("llama-3-8b --tokentune --prefix_length answers", "Add --answer_share 0.05"),
    ("llama-3-8b --answer_share 0.05", "--answer_share is for --prefix_length answers"),
    ("llama-3-8b --prefix_length answers --answer_share 1.5", "--answer_share 1.5: must be above 0 and at most 1"),
    ("llama-3-8b --prefix_length answers --dataset_name_or_path d.jsonl", "has no tokenizer"),
    ("llama-3-8b --prefix_length answers --answer_share 0.1 --dataset_name_or_path d.jsonl", "give one of them"),
    ("bert-base --prefix_length answers --answer_share 0.1", "one label for all tokens"),
    ("llama-3-8b --prefix_length answers --answer_share 0.1 --selection gradient", "which draws for a whole row"),
    (
        "llama-3-8b --tokentune --prefix_length answers --answer_share 0.1 --find proportion --memory 24",
        "--find proportion tries numbers",
    ),
    ("llama-3-8", "did you mean llama-3-8b"),
    ("./no-such-folder", "no such folder"),
    ("./no-such-folder/config.json", "no such file"),
    ("llama-3-8b --find batch", "--find batch needs the size of the card: add --memory"),
    ("llama-3-8b --memory 24", "--memory goes with --find"),
    ("llama-3-8b --find batch --memory 0", "--memory 0: must be above 0"),
    ("llama-3-8b --find proportion --memory 24", "add --tokentune"),
    ("llama-3-8b --bf16 --fp16", "exclude each other"),
    ("llama-3-8b --json /no/such/folder/x.json", "there is no such folder"),
    ("llama-3-8b --prefix_lenght 0.3", "did you mean --prefix_length"),
    ("llama-3-8b --device tpu", "--device"),
    ("llama-3-8b --attn_implementation flex_attention", "flex_attention: its kernels run on real tensors alone"),
    ("llama-3-8b --attn_implementation flash_attention_2 --lora", "run on real tensors alone"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        estimate.main(["--model_name_or_path", *words.split()])
    assert message in str(caught.value)


def test_nothing_fits(config: Path) -> None:
    words = ["--model_name_or_path", str(config), "--find", "batch", "--memory", "0.9"]
    with pytest.raises(
        UserError, match=r"not even sequences 1 fits.* Try --tokentune or --gradient_checkpointing or --l"
    ):
        estimate.main(words)
    for flags, left in (
        ("--qlora", "Try --tokentune or --gradient_checkpointing or a shorter --max_length."),
        ("--lora --tokentune --gradient_checkpointing", "Try --qlora or a shorter --max_length."),
        ("--qlora --tokentune --gradient_checkpointing --find length", "It takes a smaller model, or a card with more"),
    ):
        assert estimate.what_saves(estimate.parse([*words, *flags.split()])[0]).startswith(left)


def test_every_preset_is_a_model() -> None:
    for name, millions in {
        "llama-2-7b": 6738, "llama-2-13b": 13016, "llama-3-8b": 8030, "llama-3.2-1b": 1236, "llama-3.2-3b": 3213,
        "qwen3-8b": 8191, "mistral-7b": 7242, "llama-2-70b": 68977, "llama-3-70b": 70554,
        "bert-base": 109, "bert-large": 335,
    }.items():  # fmt: skip
        subject = load_subject(name)
        with torch.device("meta"):
            model = subject.head.auto_class.from_config(subject.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.005)


def test_the_command_exits_with_2_on_bad_input() -> None:
    script = str(ROOT / "tokentune" / "estimate.py")
    ended = subprocess.run(
        [sys.executable, script, "--model_name_or_path", "lama-2-7b"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "did you mean llama-2-7b" in ended.stderr and "Traceback" not in ended.stderr
