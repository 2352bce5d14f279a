"""Command: fold a trained adapter into its base model and save the full checkpoint.

    python tokentune/merge.py --base_model_name_or_path meta-llama/Llama-2-7b-hf \
        --peft_model_path models/my-run --output_dir models/my-run/merged

A QLoRA adapter is folded into the unquantised base. The result is written beside `--output_dir`, read back, compared
with base + adapter on fixed token ids, and only then moved into place: a failure leaves nothing behind.
`merge_summary.json` in the result records where it came from and how far its logits are from base + adapter.

Legend: B sequences, S tokens, V vocabulary.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Other packages' words on their own internals, which a user can do nothing about.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from tokentune.errors import UserError, run_command
from tokentune.loading import checkpoint_dtype, load_base_model, load_config, load_tokenizer
from tokentune.sources import first_line
from tokentune.trained_adapter import ADAPTER_FLAG, BASE_FLAG, attach_adapter, check_recorded_base, read_adapter

if TYPE_CHECKING:
    import peft

OUTPUT_FLAG = "--output_dir"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUMMARY = "merge_summary.json"  # also the mark of a folder that a later merge may replace
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PROBE_SHAPE = (2, 32)  # (B, S) of the token ids that the logits are compared on
# Relative to the logits' standard deviation, computed in float32. A float32 fold is exact up to rounding (measured:
# 5e-6), so more is a defect. A 16-bit fold rounds every adapted weight (measured: bfloat16 0.01, float16 0.001).
LARGEST_FLOAT32_DIFFERENCE, LARGEST_16_BIT_DIFFERENCE = 1e-3, 0.1


@dataclass(frozen=True)
class LogitDifference:
    """Merged model against base + adapter: the largest difference of a logit, and that over the logits' deviation."""

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"{self.largest:.3g} ({100 * self.relative:.3g} % of the logits' standard deviation)"


def check_output_folder(output: Path, sources: Sequence[str]) -> None:
    """Refuses an output folder that is in use for something else, or cannot be written.

    Args:
        sources: the base's and the adapter's folder (or hub id), which the output must not replace.
    """
    target = output.resolve()
    for source in map(os.path.realpath, sources):
        if target == Path(source) or (os.path.exists(source) and target in Path(source).parents):
            raise UserError(f"{OUTPUT_FLAG} {output}: would replace {source}, which is read. Choose another folder.")
    if target.exists() and not target.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {output}: is a file. Choose a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / SUMMARY).is_file():
        raise UserError(
            f"{OUTPUT_FLAG} {output}: holds something that is not an earlier merge (no {SUMMARY}). "
            "Empty it, or choose another folder."
        )


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """Yields an empty sibling folder, which takes `output`'s place whole when the block succeeds, else is removed.

    A sibling, because only within one file system is a rename one step. An earlier `output` is moved aside first
    and put back if the last step fails.

    Raises:
        UserError: the folder cannot be made there.
    """
    target = output.resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{OUTPUT_FLAG} {output}: cannot be written: {error.strerror}") from error
        yield partial
        aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        if target.exists():
            target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):  # never made, or somebody else's files are in it by now
                parent.rmdir()
        raise


def choose_device(device: str, model_bytes: int) -> torch.device:
    """The device named, or for "auto" the GPU when it has room for the model (and half as much again), else the CPU."""
    if device == "auto":
        roomy = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * model_bytes
        return torch.device("cuda" if roomy else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: cannot be used here: {first_line(error)}") from error
    return torch.device(device)


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within it, each module computes in float32 from the weights as they are held.

    Its weights are widened just for its own forward, so that comparing a 16-bit model in float32 takes the room of
    one layer's float32 copy, not of the whole model's.
    """
    held: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def widen(module: nn.Module, args: tuple) -> None:
        held[module] = [(p, p.data) for p in module.parameters(recurse=False)]
        for parameter, data in held[module]:
            parameter.data = data.float()

    def restore(module: nn.Module, args: tuple, output: object) -> None:
        for parameter, data in held.pop(module):
            parameter.data = data

    hooks = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def probe_logits(model: nn.Module, *, in_float32: bool) -> torch.Tensor:
    """Logits (B, S, V), float32 on the CPU, on token ids that depend on the vocabulary's size alone."""
    config = model.config.get_text_config()
    length = min(PROBE_SHAPE[1], getattr(config, "max_position_embeddings", None) or PROBE_SHAPE[1])
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(config.vocab_size, (PROBE_SHAPE[0], length), generator=generator)  # (B, S)
    device = model.get_input_embeddings().weight.device
    with float32_arithmetic(model) if in_float32 else nullcontext():
        logits = model.eval()(input_ids=token_ids.to(device), use_cache=False).logits
    return logits.float().cpu()


def logit_difference(reference: torch.Tensor, merged: torch.Tensor) -> LogitDifference:
    """Both (B, S, V)."""
    largest = (merged - reference).abs().max().item()
    return LogitDifference(largest, largest / reference.std().item())


def untie_adapted_embeddings(model: "peft.PeftModel") -> None:
    """Gives the output head its own weights where it shares the input embedding's and an adapter sits on either.

    Folding into the shared weights would change both, while the adapter changes one only.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not (hasattr(embedding, "get_base_layer") or hasattr(head, "get_base_layer")):
        return
    # (modules trained whole have no base layer: peft puts their own copy in place of the shared weights)
    embedding, head = (m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in (embedding, head))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def fold_and_save(
    base_name: str, folder: Path, config: "peft.LoraConfig", partial: Path, *, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.device]:
    """Folds the adapter in and saves model and tokenizer into `partial`; the model is freed before returning.

    Returns:
        Logits of base + adapter, computed in `dtype` and in float32 (both (B, S, V)), and the device used.
    """
    base = load_base_model(base_name, dtype=dtype, quantize_4bit=False, flag=BASE_FLAG)
    place = choose_device(device, base.get_memory_footprint())
    try:
        model = attach_adapter(base, config, folder).to(place)
        references = [probe_logits(model, in_float32=False), probe_logits(model, in_float32=True)]
        if not all(torch.isfinite(logits).all() for logits in references):
            raise UserError(f"--dtype: base + adapter gives NaN or infinite logits in {dtype}. Try --dtype float32.")
        untie_adapted_embeddings(model)
        merged = model.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError as error:
        raise UserError(f"--device {device}: out of memory on {place}. Merge with --device cpu.") from error
    except ValueError as error:  # peft's check of the folded weights
        raise UserError(f"--dtype: the folded weights exceed {dtype}'s range. Try --dtype float32.") from error
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = load_tokenizer(str(folder), flag=ADAPTER_FLAG) if own else load_tokenizer(base_name, flag=BASE_FLAG)
    try:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    except (OSError, SafetensorError) as error:  # a full disk, above all
        raise UserError(f"{OUTPUT_FLAG}: the model could not be written: {first_line(error)}") from error
    return *references, place


def merge(
    base_model_name_or_path: str,
    peft_model_path: str,
    output_dir: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
) -> float:
    """Folds an adapter into its base and saves a full checkpoint with its tokenizer; see the module's docstring.

    Args:
        base_model_name_or_path: the unquantised base, local folder or hub id.
        peft_model_path: the adapter's folder.
        output_dir: may lie inside the adapter's folder. An earlier merge there is replaced.
        device: "auto" or a torch device.
        dtype: "float32", "float16", "bfloat16", or None (or "auto") for the base's own.

    Returns:
        The largest logit difference between base + adapter and the merged model as read back, both in `dtype`.

    Raises:
        UserError: anything that the caller can cure; nothing is written then.
    """
    folder, output = Path(peft_model_path), Path(output_dir)
    base_config = load_config(base_model_name_or_path, flag=BASE_FLAG)
    if getattr(base_config, "quantization_config", None) is not None:
        raise UserError(f"{BASE_FLAG} {base_model_name_or_path}: its weights are quantised. Give the unquantised base.")
    adapter_config, _ = read_adapter(folder)
    check_recorded_base(adapter_config.base_model_name_or_path, base_model_name_or_path, base_config)
    check_output_folder(output, [base_model_name_or_path, peft_model_path])
    held = checkpoint_dtype(base_config) if dtype in (None, "auto") else DTYPES[dtype]

    with replacing_folder(output) as partial:
        in_dtype, in_float32, place = fold_and_save(
            base_model_name_or_path, folder, adapter_config, partial, device=device, dtype=held
        )
        merged = load_base_model(str(partial), dtype=held, quantize_4bit=False, flag=OUTPUT_FLAG).to(place)
        same = logit_difference(in_dtype, probe_logits(merged, in_float32=False))
        exact = logit_difference(in_float32, probe_logits(merged, in_float32=True))
        if held is torch.float32 and not exact.relative <= LARGEST_FLOAT32_DIFFERENCE:
            raise RuntimeError(f"the merged model's logits differ from base + adapter by {exact}; nothing was written")
        summary = {
            "base_model_name_or_path": base_model_name_or_path,
            "peft_model_path": peft_model_path,
            "dtype": str(held).removeprefix("torch."),
            "device": str(place),
            "logit_difference": {"in_dtype": asdict(same), "in_float32": asdict(exact)},
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": version("peft"),
            },
        }
        (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")

    print(f"largest logit difference from base + adapter, computed in {summary['dtype']}: {same}")
    if held is not torch.float32:
        print(f"the same weights, computed in float32: {exact}")
        if exact.relative > LARGEST_16_BIT_DIFFERENCE:
            print("warning: much of the adapter was lost in rounding; merge with --dtype float32", file=sys.stderr)
    print(f"saved {output}")
    return same.largest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="merge.py", description="Fold a trained adapter into its base model and save the full checkpoint."
    )
    parser.add_argument(BASE_FLAG, required=True, help="The unquantised base model: a local folder or a hub id.")
    parser.add_argument(ADAPTER_FLAG, required=True, help="The adapter's folder: a run's folder or one checkpoint.")
    parser.add_argument(OUTPUT_FLAG, required=True, help="The merged model's folder; an earlier merge is replaced.")
    parser.add_argument(
        "--device", default="auto", help="Where to compute: auto (a GPU with room, else cpu) or a device."
    )
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="The merged weights' type; auto is the base's own."
    )
    merge(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(main)
