"""The verification of the scoring pass: on the tiny copy of the model, it is compared with its definition.

The definition is plain autograd. Scores come from the whole logits (B, S, V) and the whole attention weights
(B, H, S, S) of the unmodified model, in which identities replace the layers that a shorter scoring pass leaves out. The
step with cached keys and values has to give what `definition.definition_of_the_method` gives for the same positions.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.attention.replaced import replaced_attention
from tokentune.core.layers import attention_modules, transformer_layers
from tokentune.core.patched import last_draw
from tokentune.core.patching import patched
from tokentune.core.profile import Profile
from tokentune.core.scoring_pass import ScoringOptions, run_scoring_pass
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import IGNORED_LABEL, mask_unselected_labels
from tokentune.verify.definition import definition_of_the_method
from tokentune.verify.tiny_copy import Float64, tiny_copy, undisturbed
from tokentune.verify.trial import SELECTED, Trial, agree, agree_on_gradients, make_trial, step

_OF_ITSELF = ("loss", "gradient", "attention")  # excess_loss is a difference of two losses


def verify_scoring_pass(
    model: PreTrainedModel, profile: Profile, options: ScoringOptions, needs: tuple[str, ...]
) -> None:
    """Compares scoring passes on a tiny copy of a causal `model`, and a step after one, with their definitions.

    Raises:
        UnsupportedModelError: with the place and the size of the first mismatch, and what works without a scoring pass.
    """
    try:
        with undisturbed():
            tiny = tiny_copy(model)
            layers = None if options.layers is None else min(options.layers, len(transformer_layers(tiny).layers) - 1)
            for side in ("right", "left"):
                trial = make_trial(tiny, side)
                # Padding in front of a row sees no real token, so its output means nothing.
                before_real = F.pad(trial.batch["attention_mask"][:, :-1], (1, 0)) == 0
                trial.batch["labels"] = trial.batch["labels"].masked_fill(before_real, IGNORED_LABEL)
                _compare_scores(trial, layers, needs)
                if layers is None:
                    _compare_step(trial, profile)
    except UnsupportedModelError as error:
        cure = "" if options.layers else "run it through the first layers alone (--selection_layers), or "
        raise UnsupportedModelError(
            f"a scoring pass does not serve {type(model).__name__}: {error}; {cure}take a strategy without scores"
        ) from error
    except Exception as error:  # the model's own code may raise anything here
        raise UnsupportedModelError(
            f"a scoring pass fails in {type(model).__name__}: {type(error).__name__}: {error}"
        ) from error


def _compare_scores(trial: Trial, layers: int | None, needs: tuple[str, ...]) -> None:
    tiny, batch = trial.tiny, trial.batch
    wanted = tuple(name for name in _OF_ITSELF if name in needs)
    with Float64():
        found = run_scoring_pass(tiny, transformer_layers(tiny), batch, ScoringOptions(layers=layers), wanted).scores
    defined = _scores(tiny, batch, layers, "attention" in wanted)
    for name in found:
        agree(found[name], defined[name], f"{trial.side} padding, {name} of tokens")


def _scores(tiny: PreTrainedModel, batch: dict[str, Tensor], layers: int | None, attention: bool) -> dict[str, Tensor]:
    """(B, S) by name, of the unmodified model."""
    stack = transformer_layers(tiny)
    watched = attention_modules(stack.layers[(layers or 0) - 1])[0]
    hidden, noted = [], []

    def note_weights(own: Callable, module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output, weights = own(module, *args, **options)  # (B, H, S, S)
        if module is watched:
            noted.append(weights.detach())
        return output, weights

    with Float64(), ExitStack() as undo:
        for layer in stack.layers[layers:] if layers else ():
            undo.enter_context(layer.register_forward_hook(_identity, with_kwargs=True))
        head = tiny.get_output_embeddings()
        undo.enter_context(head.register_forward_pre_hook(lambda head, args: hidden.append(args[0])))
        if attention:
            undo.enter_context(replaced_attention(stack.configs, note_weights, own="eager"))
        logits = tiny(**{name: value for name, value in batch.items() if name != "labels"}).logits
    targets = F.pad(batch["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED_LABEL)
    scores = {"loss": losses.detach(), "gradient": torch.autograd.grad(losses.sum(), hidden[0])[0].norm(dim=-1)}
    if attention:
        real = batch["attention_mask"]
        scores["attention"] = (noted[0] * real[:, None, :, None]).mean(1).sum(1) * real
    return scores


def _identity(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _compare_step(trial: Trial, profile: Profile) -> None:
    """Compares the gradients of a step after a scoring pass and a random draw with those of the definition."""
    tiny, batch = trial.tiny, trial.batch
    options = {"chunked_loss": False, "scoring": ScoringOptions()}
    with patched(tiny, profile=profile, prefix_length=SELECTED, strategy="random", **options):
        _, found = step(tiny, batch, trial.positions)
        positions = last_draw(tiny).positions
    labels = mask_unselected_labels(batch["labels"], positions, causal=True)
    with definition_of_the_method(tiny, positions):
        _, defined = step(tiny, batch | {"labels": labels}, positions)
    agree_on_gradients(found, defined, f"{trial.side} padding, after a scoring pass")
