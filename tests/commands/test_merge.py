"""Merging: the merged model is base + adapter, read back from disk; everything else is refused, leaving nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters_on_disk import MLP, files_below, logits_of, make_adapter, make_base, refused
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig

from tokentune import merge as merge_module
from tokentune.cli.command import run_command
from tokentune.errors import UserError
from tokentune.merge import main, merge
from tokentune.models.merging.logit_difference import LogitDifference, probe_logits
from tokentune.models.merging.merge_result import SUMMARY, replacing_folder
from tokentune.models.merging.trained_adapter import attach_adapter, read_adapter
from tokentune.models.merging.verdict import verdict_of
from tokentune.models.pretrained import load_base_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def adapter(tiny_llama_dir, tmp_path) -> Path:
    return make_adapter(tiny_llama_dir, tmp_path / "run")


# What a merge gives


def test_merged_model_is_base_plus_adapter(tiny_llama_dir, adapter, capsys):
    output = adapter / "merged"
    difference = merge(str(tiny_llama_dir), str(adapter), str(output))
    together, merged = logits_of(tiny_llama_dir, adapter), logits_of(output)
    torch.testing.assert_close(merged, together, rtol=0, atol=1e-5)
    assert (together - logits_of(tiny_llama_dir)).abs().max() > 0.01  # the adapter does something
    assert 0 <= difference < 1e-5

    summary = json.loads((output / SUMMARY).read_text())
    assert summary["dtype"] == "float32"
    assert summary["logit_difference"]["in_dtype"]["largest"] == difference
    effect = probe_logits(
        load_base_model(str(tiny_llama_dir), dtype=torch.float32, quantize_4bit=False), in_float32=True
    )
    effect = (effect - probe_logits(AutoModelForCausalLM.from_pretrained(output), in_float32=True)).abs().max()
    assert summary["verdict"]["adapter_effect"]["largest"] == pytest.approx(effect.item(), rel=1e-4)
    assert summary["verdict"]["kind"] == "fine" and summary["base_is_same"] is None
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2].startswith("verdict: fine: rounding the merged weights to float32 moves the logits")
    assert "largest logit difference from base + adapter, computed in float32" in printed
    assert f"saved {output}" in printed
    # a full checkpoint, with nothing of the adapter or of the way here left
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files_below(output)
    assert not any(
        "adapter" in name or "partial" in name
        for name in files_below(output) | files_below(adapter.parent)
        if not name.startswith("run/adapter_")
    )
    assert AutoTokenizer.from_pretrained(output).eos_token == "</s>"


def test_real_model(shared, tmp_path):
    base = shared / "models" / "llama-tiny"
    adapter = make_adapter(base, tmp_path / "run", ["q_proj", "v_proj", *MLP])
    difference = merge(str(base), str(adapter), str(tmp_path / "run" / "merged"), dtype="float32")
    assert difference < 1e-3
    torch.testing.assert_close(logits_of(tmp_path / "run" / "merged"), logits_of(base, adapter), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "rounding", "kind", "said"),
    [
        ("float32", 1e-6, "fine", "0.0005 % of what the adapter does (root mean square)."),
        ("bfloat16", 0.01, "fine", "5 % of what the adapter does (root mean square). The rest of the difference is"),
        ("bfloat16", 0.05, "noticeable", "25 % of what the adapter does (root mean square). --dtype float32 does not"),
        ("bfloat16", 0.2, "too large", "1e+02 % of what the adapter does"),
        ("float16", 0.2, "too large", "and hides what was learnt. --dtype float32 does not round."),
    ],
)
def test_the_verdict_is_by_what_the_adapter_does(dtype, rounding, kind, said):
    exact, effect = (LogitDifference(3 * size, 3 * size, size, size) for size in (rounding, 0.2))
    verdict = verdict_of(dtype, exact, effect)
    assert verdict.kind == kind and said in f"verdict: {verdict.sentence}"
    assert verdict.sentence.startswith(f"{kind}: ")
    assert (
        verdict_of("bfloat16", exact, LogitDifference(0, 0, 0, 0)).kind == "too large"
    )  # of an adapter without effect


# The output folder


def test_an_earlier_merge_is_replaced_whole(tiny_llama_dir, adapter, tmp_path):
    output = tmp_path / "out"
    merge(str(tiny_llama_dir), str(adapter), str(output), dtype="bfloat16")
    (output / "stale").touch()
    merge(str(tiny_llama_dir), str(adapter), str(output), dtype="float32")
    assert not (output / "stale").exists()
    assert LlamaConfig.from_pretrained(output).dtype is torch.float32
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_an_empty_folder_is_fine(tiny_llama_dir, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert (tmp_path / "out" / SUMMARY).is_file()


def test_outputs_that_are_refused(tiny_llama_dir, adapter, tmp_path):
    file = tmp_path / "file"
    file.touch()
    refused(tiny_llama_dir, adapter, file, "is a file", tmp_path)
    refused(tiny_llama_dir, adapter, file / "out", "cannot be written: Not a directory", tmp_path)
    refused(tiny_llama_dir, adapter, adapter, "would replace .*run, which is read", tmp_path)
    refused(tiny_llama_dir, adapter, tmp_path, "would replace .*run, which is read", tmp_path)
    refused(tiny_llama_dir, adapter, tiny_llama_dir, "would replace .*tiny-llama", tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    refused(tiny_llama_dir, adapter, tmp_path / "thesis", "not an earlier merge", tmp_path)


def test_a_folder_without_write_permission(tiny_llama_dir, adapter, tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # permissions do not bind the superuser, who may run the tests
    refused(tiny_llama_dir, adapter, tmp_path / "new" / "out", "--output_dir .*: cannot be written: Perm", tmp_path)


@pytest.mark.parametrize("failing", ["save_pretrained", "logit_difference", "interrupt"])
def test_a_failure_leaves_no_trace_and_the_earlier_merge(tiny_llama_dir, adapter, tmp_path, monkeypatch, failing):
    output = tmp_path / "deep" / "out"

    def fail(*args, **kwargs):
        if failing == "save_pretrained":
            (Path(args[1]) / "half").touch()
            raise OSError(28, "No space left on device")
        raise KeyboardInterrupt if failing == "interrupt" else RuntimeError("defect")

    target = (
        (LlamaForCausalLM, "save_pretrained") if failing == "save_pretrained" else (merge_module, "logit_difference")
    )
    kind = {"save_pretrained": UserError, "logit_difference": RuntimeError, "interrupt": KeyboardInterrupt}[failing]
    for earlier in (False, True):
        if earlier:
            merge(str(tiny_llama_dir), str(adapter), str(output))
        before = files_below(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(*target, fail)
            with pytest.raises(kind):
                merge(str(tiny_llama_dir), str(adapter), str(output))
        assert files_below(tmp_path) == before  # the parent made on the way is gone too, the first time


def test_the_earlier_folder_returns_when_the_last_step_fails(tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept").touch()
    rename = Path.rename

    def fail_for_partial(self, target):
        if "partial" in self.name:
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_partial)
    with pytest.raises(OSError, match="disk is gone"), replacing_folder(output) as partial:
        (partial / "new").touch()
    assert files_below(tmp_path) == {"out", "out/kept"}


def test_a_merge_that_is_wrong_is_not_kept(tiny_llama_dir, adapter, tmp_path, monkeypatch):
    """A defect on the way (here: a head scaled while saving) is noticed in the model read back."""
    save = LlamaForCausalLM.save_pretrained

    def save_wrongly(self, folder, **settings):
        self.lm_head.weight.data *= 1.01
        save(self, folder, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_wrongly)
    with pytest.raises(RuntimeError, match="differ from base"):
        merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Bases and adapters that are refused


def test_missing_folders(tiny_llama_dir, adapter, tmp_path):
    out = tmp_path / "out"
    refused("./none", adapter, out, r"--base_model_name_or_path \./none: no such folder", tmp_path)
    refused(tiny_llama_dir, tmp_path / "none", out, "--peft_model_path .*none: no such folder", tmp_path)
    refused(adapter, adapter, out, "--base_model_name_or_path .*holds an adapter", tmp_path)
    refused(tiny_llama_dir, tiny_llama_dir, out, r"no adapter_config\.json", tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    refused(tiny_llama_dir, adapter, out, r"adapter_model\.safetensors is missing", tmp_path)


def test_damaged_adapter(tiny_llama_dir, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing like weights")
    refused(tiny_llama_dir, adapter, tmp_path / "out", "--peft_model_path .*run: cannot be read", tmp_path)
    (adapter / "adapter_config.json").write_text("{broken")
    refused(tiny_llama_dir, adapter, tmp_path / "out", "--peft_model_path .*run: cannot be read", tmp_path)


def test_untrained_adapter(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "fresh", trained=False)
    refused(tiny_llama_dir, adapter, tmp_path / "out", "fresh: every lora_B .* never trained", tmp_path)
    adapter = make_adapter(tiny_llama_dir, tmp_path / "fresh_embedding", ["embed_tokens"], trained=False)
    refused(tiny_llama_dir, adapter, tmp_path / "out", "never trained", tmp_path)


def test_adapter_with_nan(tiny_llama_dir, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    refused(tiny_llama_dir, adapter, tmp_path / "out", "NaN or infinite", tmp_path)


def test_truncated_adapter(tiny_llama_dir, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    for kept in (file.stat().st_size // 2, 4, 0):
        file.write_bytes(file.read_bytes()[:kept])
        refused(tiny_llama_dir, adapter, tmp_path / "out", "--peft_model_path .*run: cannot be read", tmp_path)


def test_a_pickle_is_not_executed(tiny_llama_dir, adapter, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights | {"trap": Trap()}, adapter / "adapter_model.bin")
    refused(tiny_llama_dir, adapter, tmp_path / "out", "--peft_model_path .*run: cannot be read", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_base_of_pickles_is_read_when_asked(tiny_llama_dir, adapter, tmp_path):
    base = shutil.copytree(tiny_llama_dir, tmp_path / tiny_llama_dir.name)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    refused(base, adapter, tmp_path / "out", "--allow_pickle", tmp_path / "out")
    merge(str(base), str(adapter), str(tmp_path / "read"), allow_pickle=True)
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "expected"))
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(tmp_path / "read" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "FUTURE_TUNING"}, "holds a FUTURE_TUNING adapter; only LoRA"),
        ({"peft_type": None}, "holds a None adapter; only LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "(?s)more than a change of weights.*beside its base.*--lora_on all"),
    ],
)
def test_adapters_that_no_weight_can_stand_for(tiny_llama_dir, adapter, tmp_path, changes, words):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(tiny_llama_dir, adapter, tmp_path / "out", words, tmp_path)


def test_checkpoints(tiny_llama_dir, tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        make_adapter(tiny_llama_dir, run / f"checkpoint-{step}")
    refused(tiny_llama_dir, run, tmp_path / "out", "holds no adapter. Its newest checkpoint is .*checkpoint-10", run)
    merge(str(tiny_llama_dir), str(run / "checkpoint-2"), str(tmp_path / "out"))
    torch.testing.assert_close(
        logits_of(tmp_path / "out"), logits_of(tiny_llama_dir, run / "checkpoint-2"), rtol=0, atol=1e-5
    )


def test_a_card_of_the_users_own_outlives_an_earlier_merge(tiny_llama_dir, adapter, tmp_path):
    output = tmp_path / "out"
    merge(str(tiny_llama_dir), str(adapter), str(output))
    card = (output / "README.md").read_text()
    assert card.startswith("---\n") and "## Merging" in card
    (output / "README.md").write_text("# My model\n")
    merge(str(tiny_llama_dir), str(adapter), str(output), dtype="bfloat16")
    assert (output / "README.md").read_text() == "# My model\n"


def test_another_kind_of_adapter(tiny_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "prefix")
    refused(tiny_llama_dir, tmp_path / "prefix", tmp_path / "out", "only LoRA", tmp_path)


def test_quantised_base(tiny_llama_dir, adapter, tmp_path):
    base = make_base(tmp_path / "base", tiny_llama_dir)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    refused(base, adapter, tmp_path / "out", "quantised", tmp_path)


def forget_base(adapter: Path, recorded: str | None) -> None:
    """Replaces the adapter's record of its base."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": recorded}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 64}, "size mismatch for .*lora_"),
        ({"num_hidden_layers": 1}, "6 of its weights have no place there"),
        ({"num_hidden_layers": 3}, "lacks 6 weights for the base's layers"),
    ],
)
def test_base_of_another_shape(tiny_llama_dir, adapter, tmp_path, changes, words):
    other = make_base(tmp_path / "other", tiny_llama_dir, **changes)
    name, value = next(iter(changes.items()))
    refused(
        other, adapter, tmp_path / "out", f"trained on .*tiny-llama .*{name}.* but .*other has {name} {value}", tmp_path
    )
    forget_base(adapter, "gone/away")  # its base no longer at hand: the weights tell
    refused(other, adapter, tmp_path / "out", f"does not belong to this base .*{words}", tmp_path)


def test_same_shapes_but_another_architecture(tiny_llama_dir, adapter, tmp_path):
    llama = LlamaConfig.from_pretrained(tiny_llama_dir).to_dict()
    kept = {k: v for k, v in llama.items() if k not in ("model_type", "architectures", "transformers_version")}
    other = tmp_path / "mistral"
    AutoModelForCausalLM.from_config(MistralConfig(**kept)).save_pretrained(other)
    refused(other, adapter, tmp_path / "out", "model_type llama.* has model_type mistral", tmp_path)


def test_adapter_for_layers_that_the_base_lacks(tiny_llama_dir, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    refused(tiny_llama_dir, adapter, tmp_path / "out", "does not belong to this base.*c_attn", tmp_path)


@pytest.mark.parametrize("fault", ["missing", "superfluous"])
def test_no_weight_is_passed_over_in_silence(tiny_llama_dir, adapter, tmp_path, fault):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    if fault == "missing":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    save_file(weights, file)
    words = "lacks 1 weights" if fault == "missing" else "1 of its weights have no place"
    refused(tiny_llama_dir, adapter, tmp_path / "out", words, tmp_path)


@pytest.mark.parametrize("recorded", ["gone/away", "copy"])
def test_another_name_alone_is_only_warned_about(tiny_llama_dir, adapter, tmp_path, recorded, capsys):
    if recorded == "copy":
        recorded = str(shutil.copytree(tiny_llama_dir, tmp_path / "copy"))
    forget_base(adapter, recorded)
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert f"warning: the adapter was trained on {recorded}" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [None, "same", "same spelt otherwise"])
def test_no_warning_for_the_adapters_own_base(tiny_llama_dir, adapter, tmp_path, recorded, capsys):
    if recorded:
        forget_base(adapter, str(tiny_llama_dir) + ("/../tiny-llama/" if "otherwise" in recorded else ""))
    merge(str(tiny_llama_dir), str(adapter), str(tmp_path / "out"))
    assert "warning: the adapter" not in capsys.readouterr().err


def test_attached_weights_are_the_files(tiny_llama_dir, adapter):
    base = load_base_model(str(tiny_llama_dir), dtype=torch.bfloat16, quantize_4bit=False)
    held = dict(attach_adapter(base, read_adapter(adapter)).named_parameters())
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(held[name.replace(".weight", ".default.weight")].data, weight, rtol=0, atol=0)


def test_base_beyond_float16(tiny_llama_dir, tmp_path):
    base = make_base(tmp_path / "base", tiny_llama_dir)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 1e9
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "run")
    refused(base, adapter, tmp_path / "out", "NaN or infinite logits in torch.float16", tmp_path, dtype="float16")


def test_fold_beyond_float16(tiny_llama_dir, tmp_path):
    adapter = make_adapter(tiny_llama_dir, tmp_path / "run", ["down_proj"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:  # a weight of 2e6, on a channel whose activations are too small for the logits to overflow
        if "layers.1" in name:
            weights[name].zero_()
            weights[name][0, 0] = 1e3
    save_file(weights, file)
    refused(
        tiny_llama_dir, adapter, tmp_path / "out", "the folded weights exceed torch.float16", tmp_path, dtype="float16"
    )


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unusable_device(tiny_llama_dir, adapter, tmp_path, device):
    refused(tiny_llama_dir, adapter, tmp_path / "out", f"--device {device}: cannot be used", tmp_path, device=device)


# The command


def test_command_from_another_folder(tiny_llama_dir, adapter, tmp_path):
    flags = ["--base_model_name_or_path", tiny_llama_dir, "--peft_model_path", "run", "--output_dir", "run/merged"]
    words = [sys.executable, "-u", ROOT / "tokentune" / "merge.py", *flags, "--device", "cpu", "--dtype", "bfloat16"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(map(str, words), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "saved run/merged"
    assert LlamaConfig.from_pretrained(adapter / "merged").dtype is torch.bfloat16


def test_bad_input_ends_with_exit_code_2_and_a_message(tiny_llama_dir, capsys):
    words = ["--base_model_name_or_path", str(tiny_llama_dir), "--peft_model_path", "nowhere", "--output_dir", "out"]
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(words))
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --peft_model_path nowhere: no such folder.\n"


@pytest.mark.parametrize("words", [[], ["--dtype", "int8"], ["--unknown"]])
def test_flags_that_are_wrong(words):
    required = ["--base_model_name_or_path", "b", "--peft_model_path", "a", "--output_dir", "o"] if words else []
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main([*required, *words]))
    assert exit_.value.code == 2
