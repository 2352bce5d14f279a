"""The update of each weight within the backward pass: its gradient is applied and freed before the next one exists.

Full training otherwise holds a gradient for every weight, as much memory as the weights; here only the largest one. One
optimizer per parameter is called by a hook, once autograd has completed the parameter's gradient (after both uses of a
tied one). The recipe is torch's: docs.pytorch.org, "How to save memory by fusing the optimizer step into the backward
pass". It excludes what needs all gradients together: accumulation over micro-batches, clipping by the common norm,
float16's loss scaling, averages over processes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class OptimizerInBackward(Optimizer):
    """One optimizer per parameter with the interface of one, for schedulers, checkpoints and the Trainer.

    Its `param_groups` are the optimizers' own, so that a scheduler sets their learning rates. The weights change during
    `backward()`, so the learning rate has to be set before it, as schedulers do.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any] | nn.Parameter], *, build: Callable[..., Optimizer], **options: Any
    ) -> None:
        """
        Args:
            groups: parameters, or groups of them with options; those that need no gradient are left out.
            build: an optimizer class, or what makes one of (parameter groups, **options).
        """
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in groups]
        self.optimizers: dict[nn.Parameter, Optimizer] = {
            parameter: build([{**group, "params": [parameter]}], **options)
            for group in groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        super().__init__(self._groups_of_all(), {})
        self._norms: list[Tensor] = []
        self._new_norms: list[Tensor] = []
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._apply) for parameter in self.optimizers]

    def _groups_of_all(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def _apply(self, parameter: nn.Parameter) -> None:
        wide = torch.promote_types(parameter.grad.dtype, torch.float32)
        self._new_norms.append(torch.linalg.vector_norm(parameter.grad, dtype=wide))
        self.optimizers[parameter].step()
        parameter.grad = None

    def step(self, closure: Callable | None = None) -> None:
        """Ends a step, whose gradients have all been applied already."""
        self._norms, self._new_norms = self._new_norms, []

    def train(self) -> None:
        """For optimizers that average weights (schedule-free ones) and have modes as models do."""
        self._call("train")

    def eval(self) -> None:
        self._call("eval")

    def _call(self, name: str) -> None:
        for optimizer in self.optimizers.values():
            if callable(getattr(optimizer, name, None)):
                getattr(optimizer, name)()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in the order of the parameters."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint holds optimizers of {len(states)} parameters, the model has {len(self.optimizers)}: "
                "it was not written by a run with --optim_in_backward, or by one of another model"
            )
        for optimizer, state in zip(self.optimizers.values(), states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups_of_all()  # loading makes new ones

    def gradient_norm(self) -> float:
        """The common norm of the last step's gradients, known only after they were applied."""
        return torch.stack([norm.to(self._norms[0].device) for norm in self._norms]).norm().item()
