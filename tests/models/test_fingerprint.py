"""Fingerprints of weights: equal for equal content however it is stored, else others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tokentune.models.fingerprint import Fingerprint, fingerprint_of, fingerprint_of_checkpoint


def tensors() -> dict[str, Tensor]:
    """One that is hashed whole, one in blocks, one that both names hold."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(300, 511, generator=generator).bfloat16()  # 306,600 bytes, which 16 does not divide
    return {"norm": torch.ones(7), "embed": large, "head": large.clone()}


def saved(weights: dict[str, Tensor], folder: Path) -> Fingerprint:
    folder.mkdir()
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors")
    return fingerprint_of_checkpoint(str(folder))


def test_names_files_and_places_do_not_count(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    found = fingerprint_of_checkpoint(str(tiny_llama_dir))
    norms = [weight for weight in model.state_dict().values() if weight.ndim == 1]  # all ones: they count once
    assert found.tensors == len(model.state_dict()) - len(norms) + 1 == found.dtypes["float32"]
    assert found.numbers == model.num_parameters() - 32 * (len(norms) - 1)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint_of_checkpoint(str(tmp_path / "shards")) == found
    assert fingerprint_of(model.state_dict()) == found
    assert fingerprint_of({f"base.{name}": weight for name, weight in model.state_dict().items()}) == found
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert fingerprint_of_checkpoint(str(tmp_path / "pickled")) is None
    assert fingerprint_of_checkpoint(str(tmp_path / "pickled"), allow_pickle=True) == found


def test_a_weight_that_is_tied_or_computed_counts_once_or_not(tmp_path: Path) -> None:
    weights = tensors()
    found = saved(weights, tmp_path / "base")
    assert (found.tensors, found.dtypes) == (2, {"float32": 1, "bfloat16": 1})
    weights.pop("head")
    weights["layers.0.rotary_emb.inv_freq"] = torch.arange(4.0)
    assert saved(weights, tmp_path / "other") == found == fingerprint_of(weights)
    weights["embed"] = weights["embed"].T.contiguous().T  # the same numbers in another order of memory
    assert fingerprint_of(weights) == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w | {"norm": w["norm"] * 1.001}, "with other values"),
        (lambda w: w | dict.fromkeys(("embed", "head"), 1.01 * w["embed"]), "with other values"),
        (lambda w: w | {"bias": torch.zeros(5)}, "153,312 numbers in 3 different tensors, not 153,307 in 2"),
        (lambda w: w | {"norm": w["norm"].half()}, "of type bfloat16 and float16, not bfloat16 and float32"),
        (lambda w: w | {"norm": w["norm"][None]}, "with other values"),
    ],
)
def test_other_weights_have_another_fingerprint(change, said: str, tmp_path: Path) -> None:
    own = fingerprint_of(tensors())
    other = saved(change(tensors()), tmp_path / "other")
    assert said in own.difference(other)
    assert own.difference(fingerprint_of(tensors())) is None


def test_kept_as_json(tmp_path: Path) -> None:
    own = fingerprint_of(tensors())
    own.save(tmp_path)
    content = json.loads((tmp_path / "base_fingerprint.json").read_text())
    assert Fingerprint.from_dict(content) == own
    for other in (None, [], {}, content | {"format": 99}, {"format": 1}):
        assert Fingerprint.from_dict(other) is None


@pytest.mark.parametrize("fault", ["none", "no such", "cut short", "no header", "a shard missing"])
def test_files_that_cannot_be_read_have_none(fault: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if fault == "a shard missing":
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(folder, max_shard_size="20KB")
        next(folder.glob("*.safetensors")).unlink()
    elif fault != "no such":
        shutil.copytree(tiny_llama_dir, folder)
        path = folder / "model.safetensors"
        content = {"none": None, "cut short": path.read_bytes()[:-5], "no header": b"12345678{"}[fault]
        path.unlink() if content is None else path.write_bytes(content)
    assert fingerprint_of_checkpoint(str(folder), local_files_only=True) is None


def test_types_are_named_alike_in_files_and_in_memory(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn)
    weights = {str(kind): torch.arange(6).to(kind) for kind in kinds}
    assert saved(weights, tmp_path / "types") == fingerprint_of(weights)
    assert load_file(tmp_path / "types" / "model.safetensors").keys() == weights.keys()
