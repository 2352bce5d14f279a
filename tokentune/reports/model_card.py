"""The model card of a run's folder and of a merged one: `README.md`, as the Hugging Face hub reads it.

Everything in it stands in `training_summary.json` and `merge_summary.json`; what is not known, such as a license, is
left out. A card that somebody wrote or changed by hand is never replaced: ours ends in a mark that says so.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tokentune.reports.card_sections import (
    data_links,
    data_names,
    last_sections,
    link,
    merging,
    shown,
    trained_sections,
    usage,
)
from tokentune.sources import is_local_path

CARD_NAME = "README.md"
MARK = "<!-- Written by TokenTune at the end of a run. Take this line out and the card is yours: it stays as it is. -->"
# peft fills an empty template whenever it saves an adapter.
_PEFT_TITLE, _PEFT_BLANK = "# Model Card for Model ID", "[More Information Needed]"
_TASKS = {"text": "text-classification", "token": "token-classification", "image": "image-classification"}


# --- files ------------------------------------------------------------------------------------------------------------


def write_model_card(summary: Mapping[str, Any], run_folder: Path) -> Path | None:
    """Writes the card of a finished run.

    Args:
        summary: training_summary.json's content, of finetune.py or classify.py.

    Returns:
        The card's path; None where a card that is the user's own stays.
    """
    return _write(_trained_card(summary, run_folder.resolve().name), run_folder)


def write_merged_card(
    merged: Mapping[str, Any], summary: Mapping[str, Any] | None, folder: Path, *, name: str, own: str | None = None
) -> Path:
    """Writes the card of a merged model.

    Args:
        merged: merge_summary.json's content.
        summary: that of the run which trained the adapter; None: not known.
        folder: where it is written.
        name: of the model.
        own: a card that the user wrote for the folder that is replaced (`own_card`), to be kept instead.
    """
    if own is None:
        _write(_merged_card(merged, summary, name), folder)
    else:
        (folder / CARD_NAME).write_text(own, encoding="utf-8", errors="surrogateescape")
    return folder / CARD_NAME


def own_card(folder: Path) -> str | None:
    """The text of a folder's card that is the user's own; None where there is none, or ours, or peft's empty one."""
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    from_peft = _PEFT_TITLE in text and text.count(_PEFT_BLANK) > 10
    return None if MARK in text or from_peft else text


def _write(card: ModelCard, folder: Path) -> Path | None:
    if own_card(folder) is not None:
        return None
    path = folder / CARD_NAME
    unfinished = path.with_suffix(".md.tmp")
    unfinished.write_text(str(card), encoding="utf-8")
    os.replace(unfinished, path)
    return path


# --- cards ------------------------------------------------------------------------------------------------------------


def _trained_card(summary: Mapping[str, Any], name: str) -> ModelCard:
    settings = summary["settings"]
    adapter, task = bool(settings.get("lora")), _task(settings)
    tags = ["tokentune"] if settings.get("tokentune") else []
    tags += ["lora"] if adapter else []
    tags += ["qlora"] if settings.get("qlora") else []
    data = ModelCardData(
        **_base_and_data(settings),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=tags,
        model_name=name,
        eval_results=_eval_results(summary, task),
    )
    kind = "An adapter for" if adapter else "Fine-tuned from"
    parts = [
        f"# {name}",
        f"{kind} {link(settings['model_name_or_path'])}, trained on {data_links(settings)}.",
        *trained_sections(summary),
        "## Use\n\n" + usage(task, settings["model_name_or_path"] if adapter else None),
        *last_sections(summary, summary.get("versions") or {}),
    ]
    return _card(data, parts)


def _merged_card(merged: Mapping[str, Any], summary: Mapping[str, Any] | None, name: str) -> ModelCard:
    base = merged["base_model_name_or_path"]
    settings = ({} if summary is None else summary["settings"]) | {"model_name_or_path": base}
    task = _task(merged)
    tags = ["tokentune"] if settings.get("tokentune") else []
    data = ModelCardData(
        **_base_and_data(settings),
        library_name="transformers",
        pipeline_tag=task,
        tags=[*tags, "merged-adapter"],
    )  # no figures: they were measured on the adapter over its base
    trained = f", trained on {data_links(settings)}" if summary is not None else ""
    parts = [
        f"# {name}",
        f"{link(base)} with the adapter {shown(merged['peft_model_path'])} folded into its weights{trained}.",
        *([] if summary is None else trained_sections(summary, "Result of the training, before merging")),
        "## Merging\n\n" + merging(merged),
        "## Use\n\n" + usage(task, None),
        *last_sections(summary, ({} if summary is None else summary.get("versions") or {}) | merged["versions"]),
    ]
    return _card(data, parts)


def _card(data: ModelCardData, parts: list[str]) -> ModelCard:
    text = "\n\n".join([*parts, MARK])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")  # which reads the YAML again: it is valid


def _base_and_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub links to: only what is on the hub."""
    base, data = settings["model_name_or_path"], [name for name in data_names(settings) if not is_local_path(name)]
    return {"base_model": None if is_local_path(base) else base, "datasets": data or None}


def _task(settings: Mapping[str, Any]) -> str:
    return _TASKS.get(settings.get("task_type"), "text-generation")


def _eval_results(summary: Mapping[str, Any], task: str) -> list[EvalResult] | None:
    """The loss on validation data, or of a classifier's the score that chose its checkpoint."""
    if summary.get("best"):
        metric, value = summary["metric"], summary["best"]["score"]
    elif summary.get("validation_loss"):
        metric, value = "loss", summary["validation_loss"]["final"]
    else:
        return None
    settings = summary["settings"]
    name = settings.get("eval_dataset_name_or_path") or " + ".join(data_names(settings))
    where = {"dataset_name": shown(name), "dataset_type": shown(name), "dataset_split": "validation"}
    return [EvalResult(task_type=task, metric_type=metric, metric_name=metric, metric_value=value, **where)]
