"""The sections of a model card, from a run's and a merge's summary: tables and sentences in Markdown."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.sampling.strategies import REGISTRY
from tokentune.settings.run import STARTING
from tokentune.sources import is_local_path

_AUTO_CLASSES = {
    "text-generation": "CausalLM",
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "image-classification": "ImageClassification",
}
_EACH_TIME = "at random each time it is seen"
_CHOSEN = {
    "random": f"drawn {_EACH_TIME}",
    "reference": f"the first, the last and others drawn {_EACH_TIME}",
    "supervised": f"those with a loss first, then others drawn {_EACH_TIME}",
    "labelled": f"those with a loss first (words with an entity's label first), then others drawn {_EACH_TIME}",
    "stratified": f"evenly over it, drawn {_EACH_TIME}",
    "contiguous": f"one after another, in a window drawn {_EACH_TIME}",
}
_CITATION = """```bibtex
@inproceedings{simoulin-etal-2024-memory,
    title = "Memory-Efficient Fine-Tuning of Transformers via Token Selection",
    author = "Simoulin, Antoine and Park, Namyong and Liu, Xiaoyi and Yang, Grey",
    booktitle = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
    year = "2024",
    url = "https://aclanthology.org/2024.emnlp-main.1202/"
}
```"""


def trained_sections(summary: Mapping[str, Any], result: str = "Result") -> list[str]:
    """Method, data and figures of a training. `result`: the heading over the figures."""
    data = _data_table(summary)
    return [
        "## Method\n\n" + _method(summary["settings"]),
        *(["## Data\n\n" + data] if data else []),
        f"## {result}\n\n" + _result_table(summary),
    ]


def _method(settings: Mapping[str, Any]) -> str:
    adapters = ""
    if settings.get("lora"):
        over = " over a 4-bit base (QLoRA)" if settings.get("qlora") else ""
        targets = ", ".join(settings.get("lora_target_modules") or [])
        rank = settings.get("lora_r", "unknown")
        adapters = f"Trained are adapters of rank {rank} on {targets or 'some layers'}{over}; the base is frozen."
    if not settings.get("tokentune"):
        return adapters or "Trained are all weights, by gradients of all tokens."
    sizes = str(settings["prefix_length"]).split(":")  # two: from one to the other over the run
    several = " to ".join(f"{100 * float(size):g}" if "." in size else size for size in sizes)
    amount = f"{several} % of the tokens" if "." in sizes[0] else f"{several} tokens"
    selected = (
        f"[TokenTune](https://aclanthology.org/2024.emnlp-main.1202/): of every training sequence, {amount}, "
        f"{_chosen(settings)}, kept activations and got gradients. All tokens took part in the forward pass, so that "
        "the model is used like any other."
    )
    return f"{selected}\n\n{adapters}".strip()


def _chosen(settings: Mapping[str, Any]) -> str:
    """How the selected tokens were chosen, each time that a sequence was seen."""
    strategy = settings.get("selection") or "random"
    if strategy == "random" or (strategy == "supervised" and settings.get("task_type") in ("text", "image")):
        return _CHOSEN["random"]  # where a loss belongs to a whole sequence, no token has one of its own
    if strategy in _CHOSEN:
        how = _CHOSEN[strategy]
    elif strategy in REGISTRY and REGISTRY[strategy].needs:
        top = settings.get("selection_draw") == "top"
        how = "those with the highest scores" if top else "drawn in proportion to scores"
        how += " of a first pass over all tokens"
    else:
        how = "chosen by a strategy of its own"
    return f"{how} (`--selection {shown(strategy)}`)"


def _data_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for split, report in (summary.get("data") or {}).items():
        counts = report if isinstance(report, dict) else {}
        figures = [f"{_words(name)} {value:,}" for name, value in counts.items() if isinstance(value, int) and value]
        if figures:
            rows.append((split, ", ".join(figures)))
    for name, count in (summary.get("tokens") or {}).items():
        if isinstance(count, int):
            rows.append((f"trained on: {_words(name)}", f"{count:,}"))
    return _table(("", "counts"), rows) if rows else ""


def _result_table(summary: Mapping[str, Any]) -> str:
    rows = []
    losses, validation, best = (summary.get(name) or {} for name in ("loss", "validation_loss", "best"))
    if losses:
        rows.append(("training loss, first and last", f"{_number(losses['first'])}, {_number(losses['last'])}"))
    if validation:
        before_and_after = f"{_number(validation['base'])}, {_number(validation['final'])}"
        rows.append(("validation loss, before and after", before_and_after))
    if best:
        rows.append((f"validation {_words(summary['metric'])}", _number(best["score"])))
    if summary.get("peak_memory_bytes"):
        rows.append(("peak memory", gib(summary["peak_memory_bytes"])))
    if summary.get("saved_for_backward_bytes"):
        rows.append(("kept for the backward pass", gib(summary["saved_for_backward_bytes"])))
    if summary.get("tokens_per_second"):
        rows.append(("tokens per second", f"{summary['tokens_per_second']:.0f}"))
    device = summary.get("device")
    if device:
        rows.append(("device", f"{device['name']} x {device['count']}" if device["type"] == "cuda" else device["name"]))
    rows.append(("optimizer steps", str(summary.get("optimizer_steps", "not recorded"))))
    return _table(("measured", ""), rows)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def merging(merged: Mapping[str, Any]) -> str:
    same, exact = merged["logit_difference"]["in_dtype"], merged["logit_difference"]["in_float32"]
    rows = [(f"base + adapter, computed in {merged['dtype']}", _percent(same))]
    if merged["dtype"] != "float32":
        rows.append(("base + adapter, computed in float32", _percent(exact)))
    text = f"Weights in {merged['dtype']}. Differences of the logits, in % of their standard deviation:\n\n"
    note = ""
    if merged["qlora"] is not None:
        names = {"16bit": "folded into the 16-bit base", "dequantized": "folded into the dequantised 4-bit base"}
        for kind, difference in merged["qlora"]["from_training"].items():
            rows.append((f"4-bit base + adapter, as trained: {names[kind]}", _percent(difference)))
        note = f"\n\nThis model: {names[merged['qlora']['base']]}."
    return text + _table(("from", "root mean square", "largest"), rows) + note


def _percent(difference: Mapping[str, float]) -> tuple[str, str]:
    return tuple(f"{100 * difference[name]:.3g} %" for name in ("relative_rms", "relative"))


def usage(task: str, base: str | None) -> str:
    """`base`: of an adapter; None for a full model."""
    kind = f"AutoModelFor{_AUTO_CLASSES[task]}"
    if base is None:
        lines = [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("path/of/this/model")']
    else:
        outputs = "" if task == "text-generation" else ", num_labels=...  # as many as in training\n"
        lines = [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            "",
            f'base = {kind}.from_pretrained("{shown(base)}"{outputs})',
            'model = PeftModel.from_pretrained(base, "path/of/this/adapter")',
        ]
    return "\n".join(["```python", *lines, "```"])


def told(name: str, value: Any) -> bool:
    """Whether a setting is worth a line: it has a value, and says what was done, not how the run was started."""
    return value not in (None, [], "") and name not in STARTING


def last_sections(summary: Mapping[str, Any] | None, versions: Mapping[str, str | None]) -> list[str]:
    sections = []
    if summary is not None:
        given = {name: value for name, value in summary["settings"].items() if told(name, value)}
        rows = [(f"`{name}`", f"`{shown(value)}`") for name, value in given.items()]
        table = _table(("flag", "value"), rows)
        sections.append(f"## Settings\n\n<details><summary>All flags of the run</summary>\n\n{table}\n\n</details>")
    known = [f"{name} {number}" for name, number in versions.items() if number]
    sections.append("## Versions\n\n" + ", ".join(known))
    if summary is not None and summary["settings"].get("tokentune"):
        sections.append("## Citation\n\n" + _CITATION)
    return sections


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    flat = [[cell for part in row for cell in (part if isinstance(part, tuple) else (part,))] for row in rows]
    lines = [head, ["---"] * len(head), *flat]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def data_names(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("dataset_name_or_path") or []
    return [names] if isinstance(names, str) else list(names)


def data_links(settings: Mapping[str, Any]) -> str:
    return ", ".join(link(name, "datasets/") for name in data_names(settings)) or "data that is not recorded"


def link(name: str, kind: str = "") -> str:
    if is_local_path(name) or "/" not in name:
        return f"`{shown(name)}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def shown(value: Any) -> str:
    """A setting as a reader elsewhere may see it: of a local path its last component."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or (is_local_path(value) and "/" in value)):
        return Path(re.sub(r"/+$", "", value)).name
    return value if isinstance(value, str) else json.dumps(value)
