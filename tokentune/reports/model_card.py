"""Writes the model card (`README.md`) of a run's folder or of a merged model, in the Hugging Face hub's format.

The text is in `model_card.jinja`; all figures come from `training_summary.json` and `merge_summary.json`. What is not
known, such as the licence, is left out. A card that the user wrote or changed is never replaced: TokenTune's own cards
end in a mark.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tokentune.card_file import MARK, own_card
from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.file_names import CARD_NAME, CHAT_TEMPLATE_NAME
from tokentune.models.tasks import CAUSAL_LM, HEADS
from tokentune.sampling.strategies import REGISTRY
from tokentune.settings.run import STARTING
from tokentune.sources import is_local_path
from tokentune.training.checkpoints.saving import write_whole

Summary = Mapping[str, Any]


def model_name(folder: Path) -> str:
    """The name of the model in a folder: the folder's, or for a run's `merged` folder `<run>-merged`."""
    folder = folder.resolve()
    return f"{folder.parent.name}-merged" if folder.name == "merged" else folder.name


def write_model_card(summary: Summary, run_folder: Path) -> Path | None:
    """Writes the card of a finished run.

    Args:
        summary: the content of `training_summary.json`, by `finetune.py` or `classify.py`.

    Returns:
        The card's path; None if the folder has a card of the user's own, which stays.
    """
    if own_card(run_folder) is not None:
        return None
    settings, name = summary["settings"], run_folder.resolve().name
    _write(
        run_folder / CARD_NAME,
        name,
        summary,
        None,
        library_name="peft" if settings.get("lora") else "transformers",
        tags=[flag for flag in ("tokentune", "lora", "qlora") if settings.get(flag)],
        model_name=name,
        eval_results=_eval_results(summary),
    )
    return run_folder / CARD_NAME


def write_merged_card(
    merged: Summary, summary: Summary | None, folder: Path, *, name: str, own: str | None = None
) -> None:
    """Writes the card of a merged model. It has no scores: these were measured on the adapter over its base.

    Args:
        merged: the content of `merge_summary.json`.
        summary: the summary of the run that trained the adapter; None: not known.
        folder: where it is written.
        name: of the model.
        own: the user's own card of the folder that is replaced (`own_card`), which is kept instead.
    """
    if own is not None:
        (folder / CARD_NAME).write_text(own, encoding="utf-8", errors="surrogateescape")
        return
    tags = ["tokentune"] if summary and summary["settings"].get("tokentune") else []
    _write(folder / CARD_NAME, name, summary, merged, library_name="transformers", tags=[*tags, "merged-adapter"])


def _write(path: Path, name: str, summary: Summary | None, merged: Summary | None, **metadata: Any) -> None:
    run = summary or {}
    flags = run.get("settings", {})
    settings = flags | ({"model_name_or_path": merged["base_model_name_or_path"]} if merged else {})
    base, datasets = settings["model_name_or_path"], _names(settings, "dataset_name_or_path")
    versions = (run.get("versions") or {}) | (merged or {}).get("versions", {})
    strategy = REGISTRY.get(settings.get("selection"))
    data = ModelCardData(
        base_model=None if is_local_path(base) else base,
        datasets=[name for name in datasets if not is_local_path(name)] or None,
        pipeline_tag=_task(merged or settings),
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".jinja")),
        name=name,
        summary=summary,
        merged=merged,
        settings=settings,
        base=base,
        data_names=datasets,
        auto_class=HEADS.get((merged or settings).get("task_type"), CAUSAL_LM).auto_class.__name__,
        chats=(path.parent / CHAT_TEMPLATE_NAME).is_file(),
        scored=strategy is not None and strategy.needs,
        # those that say what was done, not how the run was started
        flags={flag: value for flag, value in flags.items() if value not in (None, [], "") and flag not in STARTING},
        versions=[f"{library} {number}" for library, number in versions.items() if number],
        mark=MARK,
        gib=gib,
        link=link,
        shown=shown,
    )
    write_whole(path, str(card))


def _task(settings: Summary) -> str:
    kind = settings.get("task_type")
    return "text-generation" if kind is None else f"{kind}-classification"


def _names(settings: Summary, flag: str) -> list[str]:
    names = settings.get(flag) or []
    return [names] if isinstance(names, str) else list(names)


def _eval_results(summary: Summary) -> list[EvalResult] | None:
    """The validation loss, or of a classifier the score that chose its checkpoint, and that of the test data."""
    found = []
    if summary.get("best"):
        found.append(("validation", summary["metric"], summary["best"]["score"]))
    elif summary.get("validation_loss"):
        found.append(("validation", "loss", summary["validation_loss"]["final"]))
    if summary.get("test"):
        found.append(("test", summary["test"]["metric"], summary["test"]["score"]))
    settings = summary["settings"]
    results, own = [], _names(settings, "dataset_name_or_path")
    for split, metric, value in found:
        flag = f"{'eval' if split == 'validation' else split}_dataset_name_or_path"
        name = " + ".join(map(shown, _names(settings, flag) or own))
        where = {"dataset_name": name, "dataset_type": name, "dataset_split": split}
        results.append(
            EvalResult(task_type=_task(settings), metric_type=metric, metric_name=metric, metric_value=value, **where)
        )
    return results or None


def link(name: str, kind: str = "") -> str:
    """A model or data set of the hub as a link; a local one by its name. `kind`: "datasets/", or "" for models."""
    if is_local_path(name) or "/" not in name:
        return f"`{shown(name)}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def shown(value: Any) -> str:
    """A setting as others may see it: of a local path the last component."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or (is_local_path(value) and "/" in value)):
        return Path(value).name
    return value if isinstance(value, str) else json.dumps(value)
