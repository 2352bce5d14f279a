"""Writes the model card of a run's folder, or of a merged model: `README.md`, as the Hugging Face hub reads it.

The text is in `model_card.jinja`; all figures are from `training_summary.json` and `merge_summary.json`. What is not
known, such as the licence, is left out. A card that the user wrote or changed is never replaced: TokenTune's own cards
end in a mark.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tokentune.card_file import MARK, own_card
from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.file_names import CARD_NAME
from tokentune.models.tasks import CAUSAL_LM, HEADS
from tokentune.sampling.strategies import REGISTRY
from tokentune.settings.run import STARTING
from tokentune.sources import is_local_path
from tokentune.training.checkpoints.saving import write_whole

_EACH_TIME = "at random each time it is seen"
_CHOSEN = {
    "random": f"drawn {_EACH_TIME}",
    "reference": f"the first, the last and others drawn {_EACH_TIME}",
    "supervised": f"those with a loss first, then others drawn {_EACH_TIME}",
    "labelled": f"those with a loss first (words with an entity's label first), then others drawn {_EACH_TIME}",
    "stratified": f"evenly over it, drawn {_EACH_TIME}",
    "contiguous": f"one after another, in a window drawn {_EACH_TIME}",
}


def model_name(folder: Path) -> str:
    """The name of the model in a folder: the folder's, or for a run's `merged` folder `<run>-merged`."""
    folder = folder.resolve()
    return f"{folder.parent.name}-merged" if folder.name == "merged" else folder.name


def write_model_card(summary: Mapping[str, Any], run_folder: Path) -> Path | None:
    """Writes the card of a finished run.

    Args:
        summary: the content of `training_summary.json`, by `finetune.py` or `classify.py`.

    Returns:
        The card's path; None if the folder has a card of the user's own, which stays.
    """
    settings = summary["settings"]
    adapter, task = bool(settings.get("lora")), _task(settings)
    name = run_folder.resolve().name
    data = ModelCardData(
        **_links(settings),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=[flag for flag in ("tokentune", "lora", "qlora") if settings.get(flag)],
        model_name=name,
        eval_results=_eval_results(summary, task),
    )
    return _write(data, run_folder, name=name, summary=summary, merged=None, settings=settings)


def write_merged_card(
    merged: Mapping[str, Any], summary: Mapping[str, Any] | None, folder: Path, *, name: str, own: str | None = None
) -> None:
    """Writes the card of a merged model.

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
    settings = (summary["settings"] if summary else {}) | {"model_name_or_path": merged["base_model_name_or_path"]}
    data = ModelCardData(
        **_links(settings),
        library_name="transformers",
        pipeline_tag=_task(merged),
        tags=[*(["tokentune"] if settings.get("tokentune") else []), "merged-adapter"],
    )  # no results: they were measured on the adapter over its base
    _write(data, folder, name=name, summary=summary, merged=merged, settings=settings)


def _write(
    data: ModelCardData,
    folder: Path,
    *,
    name: str,
    summary: Mapping[str, Any] | None,
    merged: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> Path | None:
    if own_card(folder) is not None:
        return None
    flags = [] if summary is None else summary["settings"].items()
    versions = ((summary or {}).get("versions") or {}) | (merged or {}).get("versions", {})
    head = HEADS.get((merged or settings).get("task_type"), CAUSAL_LM)
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_suffix(".jinja")),
        name=name,
        summary=summary,
        merged=merged,
        settings=settings,
        base=settings["model_name_or_path"],
        task=data.pipeline_tag,
        auto_class=head.auto_class.__name__,
        data_links=", ".join(link(name, "datasets/") for name in _data_names(settings)) or "data that is not recorded",
        amount=_amount(settings),
        chosen=_chosen(settings),
        counts=_counts(summary or {}),
        # those that say what was done, not how the run was started
        flags=[(name, shown(value)) for name, value in flags if value not in (None, [], "") and name not in STARTING],
        versions=[f"{name} {number}" for name, number in versions.items() if number],
        mark=MARK,
        **{"gib": gib, "link": link, "number": _number, "shown": shown, "words": _words},
    )
    write_whole(folder / CARD_NAME, str(card))
    return folder / CARD_NAME


# --- front matter -----------------------------------------------------------------------------------------------------


def _task(settings: Mapping[str, Any]) -> str:
    kind = settings.get("task_type")
    return "text-generation" if kind is None else f"{kind}-classification"


def _data_names(settings: Mapping[str, Any], flag: str = "dataset_name_or_path") -> list[str]:
    names = settings.get(flag) or []
    return [names] if isinstance(names, str) else list(names)


def _links(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Base and data sets, those that are on the hub."""
    base, data = settings["model_name_or_path"], [name for name in _data_names(settings) if not is_local_path(name)]
    return {"base_model": None if is_local_path(base) else base, "datasets": data or None}


def _eval_results(summary: Mapping[str, Any], task: str) -> list[EvalResult] | None:
    """The validation loss, or of a classifier the score that chose its checkpoint."""
    if summary.get("best"):
        metric, value = summary["metric"], summary["best"]["score"]
    elif summary.get("validation_loss"):
        metric, value = "loss", summary["validation_loss"]["final"]
    else:
        return None
    settings = summary["settings"]
    names = _data_names(settings, "eval_dataset_name_or_path") or _data_names(settings)
    name = " + ".join(map(shown, names))
    where = {"dataset_name": name, "dataset_type": name, "dataset_split": "validation"}
    return [EvalResult(task_type=task, metric_type=metric, metric_name=metric, metric_value=value, **where)]


# --- text -------------------------------------------------------------------------------------------------------------


def _amount(settings: Mapping[str, Any]) -> str:
    """How many tokens of a sequence were selected."""
    sizes = str(settings.get("prefix_length")).split(":")  # two: of a schedule over the run
    several = " to ".join(f"{100 * float(size):g}" if "." in size else size for size in sizes)
    return f"{several} % of the tokens" if "." in sizes[0] else f"{several} tokens"


def _chosen(settings: Mapping[str, Any]) -> str:
    """How the selected tokens were chosen, each time that a sequence was seen."""
    strategy = settings.get("selection") or "random"
    if strategy == "random" or (strategy == "supervised" and settings.get("task_type") in ("text", "image")):
        return _CHOSEN["random"]  # where a whole sequence has one loss, no token has a loss of its own
    if strategy in _CHOSEN:
        how = _CHOSEN[strategy]
    elif strategy in REGISTRY and REGISTRY[strategy].needs:
        top = settings.get("selection_draw") == "top"
        how = "those with the highest scores" if top else "drawn in proportion to scores"
        how += " of a first pass over all tokens"
    else:
        how = "chosen by a strategy of its own"
    return f"{how} (`--selection {shown(strategy)}`)"


def _counts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of data: what each split holds, and on what was trained."""
    rows = []
    for split, report in (summary.get("data") or {}).items():
        figures = [
            f"{_words(name)} {count:,}" for name, count in (report or {}).items() if isinstance(count, int) and count
        ]
        rows += [(split, ", ".join(figures))] if figures else []
    counts = (summary.get("tokens") or {}).items()
    return rows + [(f"trained on: {_words(name)}", f"{count:,}") for name, count in counts if isinstance(count, int)]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def link(name: str, kind: str = "") -> str:
    """A model or data set of the hub as a link; a local one by its name."""
    if is_local_path(name) or "/" not in name:
        return f"`{shown(name)}`"
    return f"[{name}](https://huggingface.co/{kind}{name})"


def shown(value: Any) -> str:
    """A setting as others may see it: of a local path the last component."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or (is_local_path(value) and "/" in value)):
        return Path(re.sub(r"/+$", "", value)).name
    return value if isinstance(value, str) else json.dumps(value)
