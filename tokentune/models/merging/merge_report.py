"""What a merge reports: `merge_summary.json`, and the lines that it prints."""

import sys
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
import transformers

from tokentune.models.merging.folding import Plan
from tokentune.models.merging.logit_difference import LogitDifference
from tokentune.models.merging.vocabulary import is_tied
from tokentune.models.tasks import HEADS, IMAGE

QLORA_FLAG = "--qlora_base"
LARGEST_16_BIT_DIFFERENCE = 0.1  # of the logits' deviation; rounding every adapted weight once gives 0.01 in bfloat16


def merge_summary(
    plan: Plan, merged: Any, adapter_folder: str, same: LogitDifference, exact: LogitDifference
) -> dict[str, Any]:
    vocabulary = None
    if plan.head is not IMAGE:
        rows = {"base": plan.base_rows, "merged": plan.rows}
        vocabulary = rows | {"tied": is_tied(merged)}
    return {
        "schema_version": 2,
        "base_model_name_or_path": plan.base,
        "peft_model_path": adapter_folder,
        "task_type": next((name for name, head in HEADS.items() if head is plan.head), None),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.place),
        "vocabulary": vocabulary,
        "logit_difference": {"in_dtype": asdict(same), "in_float32": asdict(exact)},
        "qlora": None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": version("peft")},
    }


def report(summary: dict[str, Any], same: LogitDifference, exact: LogitDifference) -> None:
    vocabulary = summary["vocabulary"]
    if vocabulary is not None and vocabulary["merged"] != vocabulary["base"]:
        print(f"embeddings: {vocabulary['merged']} rows, as in training (the base has {vocabulary['base']})")
    rounding = "" if summary["dtype"] == "float32" else ", which rounds the merged weights and every activation"
    print(f"largest logit difference from base + adapter, computed in {summary['dtype']}{rounding}: {same}")
    if summary["dtype"] != "float32":
        print(f"the same weights, computed in float32: {exact}")
        if exact.relative > LARGEST_16_BIT_DIFFERENCE:
            print("warning: much of the adapter was lost in rounding; merge with --dtype float32", file=sys.stderr)
    if summary["qlora"] is None:
        return
    saved, measured = summary["qlora"]["base"], summary["qlora"]["from_training"]
    print("logit difference from what was trained, the 4-bit base + adapter, in % of the logits' standard deviation:")
    for kind, difference in measured.items():
        figures = f"{100 * difference['relative_rms']:.3g} % (root mean square), {100 * difference['relative']:.3g} %"
        print(f"  {QLORA_FLAG} {kind}: {figures} (largest){', saved' if kind == saved else ''}")
    closer = min(measured, key=lambda kind: measured[kind]["rms"])
    if closer != saved:
        print(f"{QLORA_FLAG} {closer} is closer to what was trained than what was saved")
