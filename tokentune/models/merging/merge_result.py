"""What a merge leaves: a folder that comes into place whole or not at all, `merge_summary.json`, and printed lines."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from tokentune.errors import UserError
from tokentune.file_modes import with_usual_modes
from tokentune.models.merging.folding import Plan
from tokentune.models.merging.logit_difference import LogitDifference
from tokentune.models.merging.trained_adapter import OUTPUT_FLAG, QLORA_FLAG
from tokentune.models.merging.trained_shapes import is_tied
from tokentune.models.merging.verdict import Verdict, qlora_verdict
from tokentune.models.tasks import HEADS, IMAGE
from tokentune.settings.flags import require

SUMMARY = "merge_summary.json"  # also the mark of a folder that a later merge may replace


def check_output_folder(output: Path, sources: Sequence[str]) -> None:
    """Refuses an output folder that is in use for something else, or cannot be written.

    Args:
        sources: the base's and the adapter's folder (or hub id), which the output must not replace.
    """
    target = output.resolve()
    for source in map(os.path.realpath, sources):
        require(
            target != Path(source) and not (os.path.exists(source) and target in Path(source).parents),
            f"{OUTPUT_FLAG} {output}: would replace {source}, which is read. Choose another folder.",
        )
    require(target.is_dir() or not target.exists(), f"{OUTPUT_FLAG} {output}: is a file. Choose a folder.")
    require(
        not target.is_dir() or (target / SUMMARY).is_file() or not any(target.iterdir()),
        f"{OUTPUT_FLAG} {output}: holds something that is not an earlier merge (no {SUMMARY}). "
        "Empty it, or choose another folder.",
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
        with_usual_modes(partial)
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


def merge_summary(
    plan: Plan, merged: Any, adapter_folder: str, same: LogitDifference, exact: LogitDifference
) -> dict[str, Any]:
    """The content of `merge_summary.json` (schema in `tokentune/merge.py`), but for `qlora`.

    Args:
        merged: the merged model, read back.
        same, exact: how far its logits are from base + adapter's, computed in the weights' type and in float32.
    """
    vocabulary = {"base": plan.base_rows, "merged": plan.rows, "tied": is_tied(merged)}
    return {
        "schema_version": 2,
        "base_model_name_or_path": plan.base,
        "base_is_same": plan.base_is_same,
        "peft_model_path": adapter_folder,
        "task_type": next((name for name, head in HEADS.items() if head is plan.head), None),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.place),
        "vocabulary": None if plan.head is IMAGE else vocabulary,
        "logit_difference": {"in_dtype": asdict(same), "in_float32": asdict(exact)},
        "qlora": None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": version("peft")},
    }


def report(summary: dict[str, Any], same: LogitDifference, exact: LogitDifference, verdict: Verdict) -> None:
    """Prints the differences that were measured, and what they mean."""
    vocabulary, dtype, qlora = summary["vocabulary"], summary["dtype"], summary["qlora"]
    if vocabulary is not None and vocabulary["merged"] != vocabulary["base"]:
        print(f"embeddings: {vocabulary['merged']} rows, as in training (the base has {vocabulary['base']})")
    rounding = "" if dtype == "float32" else ", which rounds the merged weights and every activation"
    print(f"largest logit difference from base + adapter, computed in {dtype}{rounding}: {same}")
    if dtype != "float32":
        print(f"the same weights, computed in float32: {exact}")
    if qlora is not None:
        print(
            "logit difference from what was trained, the 4-bit base + adapter, in % of the logits' standard deviation:"
        )
        for kind, difference in qlora["from_training"].items():
            mean, largest = (100 * difference[name] for name in ("relative_rms", "relative"))
            saved = ", saved" if kind == qlora["base"] else ""
            print(f"  {QLORA_FLAG} {kind}: {mean:.3g} % (root mean square), {largest:.3g} % (largest){saved}")
    print(f"verdict: {verdict.sentence}")
    if qlora is not None:
        print(f"verdict on QLoRA: {qlora_verdict(qlora, QLORA_FLAG)}")
