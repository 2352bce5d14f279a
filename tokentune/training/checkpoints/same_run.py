"""Whether two command lines make the same run: flags that would make it another one, and those that may change.

Flags that only change the order of sums are named in a warning; where things are written, and how often, may change.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokentune.errors import UserError
from tokentune.sources import is_local_path

logger = logging.getLogger(__name__)

# Flags without effect on the weights: what a run writes and reports, and where.
HARMLESS = {
    *("model_save_path", "run_name", "overwrite_output_dir", "save_steps", "save_total_limit", "logging_steps"),
    *("logging_dir", "report_to", "print_run_folder", "resume_from_checkpoint", "preview", "dry_run", "report_memory"),
    *("offline", "memory_snapshot", "skip_memory_probe", "skip_verification", "num_workers", "tokenize_workers"),
    *("data_cache", "push_to_hub", "trust_remote_code", "allow_pickle", "fp16_opt_level", "hub_public"),
}
# The same numbers, summed in another order or rounded elsewhere; mostly what helps after running out of memory.
ROUNDING = {
    *("gradient_accumulation_steps", "auto_micro_batch", "gradient_checkpointing", "checkpoint_rest", "offload_kv"),
    *("chunked_loss", "attn_implementation", "use_liger_kernel", "model_parallel"),
}
# Not for a stream that several workers read: each fills the places of dropped rows with later rows of its own.
STREAMED = {"num_workers", "gradient_accumulation_steps"}
_BY_NAME = {  # files may have moved; the rows themselves are compared once they are read
    *("model_name_or_path", "dataset_name_or_path", "eval_dataset_name_or_path", "prompt_template_name_or_path"),
    "chat_template",
}


def check_same_run(flags: dict[str, Any], before: dict[str, Any], where: str) -> None:
    """Refuses, UserError, flags that make another run than those of `before`; warns of flags that change rounding."""
    now = json.loads(json.dumps(flags))
    changed = {name: before[name] for name in now if name in before and not _same(name, before[name], now[name])}
    workers = max(settings.get("num_workers", 0) for settings in (before, now))
    bound = STREAMED if now.get("streaming") and workers > 1 else set()
    other = [name for name in changed if name not in (HARMLESS | ROUNDING) - bound]
    if other:
        raise UserError(
            f"{where} was made with other flags, and going on with these would be another run:\n"
            f"{_listed(other, now, before)}.\n"
            "Give the same flags again, or start anew: --run_name NAME, or --overwrite_output_dir."
        )
    if rounding := [f"--{name}" for name in changed if name in ROUNDING]:
        logger.warning("%s: not as in %s; the result is the same up to rounding", ", ".join(rounding), where)


def differences(flags: dict[str, Any], before: dict[str, Any]) -> str:
    """The flags that are not as before, but for those without effect on the weights, with both values; or ""."""
    now = json.loads(json.dumps(flags))
    changed = [name for name in now if name not in HARMLESS and now[name] != before.get(name, now[name])]
    return _listed(changed, now, before)


def _listed(names: Iterable[str], now: dict[str, Any], before: dict[str, Any]) -> str:
    return ", ".join(f"--{name} {_shown(now[name])} (there {_shown(before[name])})" for name in names)


def _same(name: str, before: Any, now: Any) -> bool:
    if name in _BY_NAME:
        return _file_names(before) == _file_names(now)
    return before == now


def _file_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_file_names(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
