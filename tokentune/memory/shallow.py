"""Peaks of deep models, predicted from copies with few layers.

Each of L layers that are alike adds as many bytes: peak(L) = peak(2) + (L - 2) / 2 * (peak(4) - peak(2)).
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig

from tokentune.core.checkpointing import plan_segments
from tokentune.models.tasks import Head
from tokentune.settings.finetune import Arguments
from tokentune.verify.tiny_copy import cut_layers, per_layer

SHALLOW = (2, 4)  # layers of the copies


def with_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """A copy of `config` with its first `depth` layers."""
    config = copy.deepcopy(config)
    cut_layers(config.get_text_config(), depth)
    return config


def predicted(config: PreTrainedConfig, peak: Callable[[int], int]) -> float:
    """The peak of the whole model in bytes; `peak`: that of its copy with so many layers."""
    few, more = SHALLOW
    low, high = peak(few), peak(more)
    return low + (config.get_text_config().num_hidden_layers - few) / (more - few) * (high - low)


def why_not_predictable(config: PreTrainedConfig, arguments: Arguments, head: Head) -> str | None:
    """Why few layers do not tell the peak of all, or would take no less time; None where they do."""
    selection, memory = arguments.selection, arguments.memory
    if config.get_text_config().num_hidden_layers <= sum(SHALLOW):
        return "the model has few layers"
    if selection.tokentune and memory.gradient_checkpointing and _may_be_segments(config, arguments):
        return "what checkpointing keeps depends on the number of layers (--checkpoint_rest segments, or auto here)"
    if selection.scoring_pass and selection.selection_layers is not None:
        return "--selection_layers depends on the number of layers"
    return None if _alike(config, arguments, head) else "the layers differ"


def _may_be_segments(config: PreTrainedConfig, arguments: Arguments) -> bool:
    """Whether checkpointing keeps segments. Where not even the share of selected tokens is known, it may."""
    rest, share = arguments.memory.checkpoint_rest, arguments.selection.selected
    if rest != "auto":
        return rest == "segments"
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    groups = getattr(text, "num_key_value_heads", None) or heads
    share = share if isinstance(share, float) else 0.0
    keys_values = 2 * groups * (getattr(text, "head_dim", None) or hidden // heads) / hidden
    return plan_segments(text.num_hidden_layers, share, 1 - share, (1 - share) * keys_values)[1]


def _alike(config: PreTrainedConfig, arguments: Arguments, head: Head) -> bool:
    """Whether all layers have the same entries in the configuration, and weights of the same names and shapes."""
    if any(value != type(value)(value[:1]) * len(value) for value in per_layer(config.get_text_config()).values()):
        return False
    with torch.device("meta"):
        model = head.auto_class.from_config(config, trust_remote_code=arguments.model.trust_remote_code)
    stacks: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for name, parameter in model.named_parameters():
        if (numbered := re.match(r"(.*?)\.(\d+)\.(.*)", name)) is not None:
            stacks[numbered[1]][numbered[2]].add((numbered[3], parameter.shape))
    return all(layer == next(iter(layers.values())) for layers in stacks.values() for layer in layers.values())
