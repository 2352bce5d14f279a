"""peft's activated LoRA (arXiv 2504.12397) in a selective forward: adapters that act from an invocation on.

    B sequences, S tokens, Q = K or R of one group

peft tells its layers how many tokens get the adapter, counted from the end of each row (`alora_offsets`). A group holds
a part of these tokens, so during a step the layers run `ActivatedLora.forward` in place of peft's own, with a mask by
the tokens' places in the sequence. Where all unselected tokens stand in front of the invocation, their keys and values
depend on the base's weights alone, and the selective gradient is the full one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from tokentune.core.step import SELECTED, UNSELECTED, Step, uncompiled
from tokentune.errors import UnsupportedModelError

_RECOMPUTING = "_peft_gradient_checkpointing_forward_hooks"


@dataclass
class ActivatedLora:
    """The adapters of one step."""

    step: Step
    offsets: Sequence[int | None] | None = None  # tokens from each row's end on; known from peft's first call
    masks: dict[str, Tensor | None] = field(default_factory=dict)  # by group

    @uncompiled
    def forward(
        self,
        module: nn.Module,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the variant's own: `result` (B, Q, out) of the base layer, and the adapter's of `x` (B, Q, in) added."""
        if self.offsets is None:  # in a recomputation peft no longer tells them
            self.offsets = alora_offsets
        mask = self._mask(x)
        if mask is None:
            return result
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(lora_A.weight.dtype))
        added = lora_B(lora_A(x)) * module.scaling[active_adapter]
        return (result + added * mask.to(added)).to(result.dtype)

    def _mask(self, x: Tensor) -> Tensor | None:
        """Which tokens get the adapter, (B, Q, 1) bool; None: none of the unselected ones."""
        call, order = self.step.call, self.step.order
        length = x.shape[1] if order is None else order.shape[1]
        whole = call is None and x.shape[1] == length  # in front of the layers, or behind them with all rows
        group = "all" if whole else SELECTED if call is None else call.running
        if group not in self.masks:
            places = torch.arange(length, device=x.device).expand(len(x), -1) if whole else self.step.indices(group)
            if self.offsets is None:  # peft saw no token ids, and has the base alone run
                starts = [length] * len(x)
            else:
                starts = [length - min(offset or 0, length) for offset in self.offsets]
            mask = places >= torch.tensor(starts, device=places.device)[:, None]
            # One look per step. Without data (an estimate) the rows are as they are in training.
            passed_over = group == UNSELECTED and (is_fake(mask) or not mask.any())
            self.masks[group] = None if passed_over else mask[..., None]
        mask = self.masks[group]
        if mask is not None and mask.shape[:2] != x.shape[:-1]:
            raise UnsupportedModelError(
                "activated LoRA (alora_invocation_tokens) on a module that gets tokens without their rows, as experts "
                "and an output head do: leave it out of target_modules"
            )
        return mask


def take_over_recomputation(layers: Iterable[nn.Module]) -> None:
    """Removes the hooks by which peft tells its layers the offsets again while checkpointed `layers` are recomputed.

    A step has its own recomputation. Without gradients there is none, nor the backward pass in which peft removes them
    itself: it would refuse the next forward pass.
    """
    for layer in layers:
        hooks = getattr(layer, _RECOMPUTING, None) or ()
        while hooks:
            hooks.pop().remove()
