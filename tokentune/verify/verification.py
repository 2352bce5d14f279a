"""The verification: a model is compared with the definition of the method before it is patched.

A tiny random copy of the model (`verify/tiny_copy.py`) runs twice on a padded batch (`verify/trial.py`): once patched,
once by the definition (Simoulin et al., EMNLP 2024, section 3):

    run the unmodified model; replace each row of a layer's input outside of the selection by a constant, and
    likewise each query, key and value inside attention; take the loss over the selected rows.

Outputs and all parameter gradients have to agree, and the definition's outputs have to be those of the unpatched model.
The verification also finds out which rows the head needs (`profile.Rows`) and which token it pools.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.attention.replaced import replaced_attention
from tokentune.core.layers import attention_modules, transformer_layers
from tokentune.core.loss import take_loss_in_chunks, why_not_in_chunks
from tokentune.core.patched import last_draw
from tokentune.core.patching import patched
from tokentune.core.profile import Profile, Rows
from tokentune.core.scoring_pass import ScoringOptions, run_scoring_pass
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import IGNORED_LABEL, mask_unselected_labels
from tokentune.verify.definition import definition_of_the_method
from tokentune.verify.tiny_copy import Float64, tiny_copy, undisturbed
from tokentune.verify.trial import (
    SELECTED,
    Trial,
    agree,
    agree_on_gradients,
    arguments_of_layers,
    layer_outputs,
    make_trial,
    step,
)

_OF_ITSELF = ("loss", "gradient", "attention")  # excess_loss is a difference of two losses


def verified_profile(model: PreTrainedModel) -> Profile:
    """Compares a tiny copy of `model` with the definition of the method, on both sides of padding.

    Raises UnsupportedModelError with the place and the size of the first mismatch.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedModelError(
            "`config.output_router_logits` adds a loss over the routers of all tokens: set it to False"
        )
    with undisturbed():
        try:
            tiny = tiny_copy(model)
            per_token = arguments_of_layers(tiny)
            trials = [make_trial(tiny, side) for side in ("right", "left")]
        except UnsupportedModelError:
            raise
        except Exception as error:  # the model's own code may raise anything on sizes that it was not written for
            raise UnsupportedModelError(
                f"no small copy of {type(model).__name__} could be run to verify it: {type(error).__name__}: {error}"
            ) from error
        pooling = next((trial.pooling for trial in trials if trial.pooling is not None), None)
        first_error = None
        for rows in (Rows.SELECTED, Rows.GATHERED, Rows.ALL):
            try:
                profile = Profile(rows, pooling, per_token=per_token)
                for trial in trials:
                    _compare(trial, profile)
                return replace(profile, whole_logits=_why_whole_logits(trials[0], profile))
            except UnsupportedModelError as error:
                first_error = first_error or error
        raise UnsupportedModelError(f"{first_error}{_likely_reason(tiny, str(first_error))}") from first_error


def verify_correction(model: PreTrainedModel, profile: Profile) -> None:
    """The same for the corrected gradient of a causal `model`."""
    with undisturbed():
        tiny = tiny_copy(model)
        for side in ("right", "left"):
            _compare(make_trial(tiny, side), profile, correction=1.0)


def _likely_reason(tiny: PreTrainedModel, message: str) -> str:
    """What in the model's code explains a mismatch; empty where nothing is found."""
    attention = attention_modules(transformer_layers(tiny).layers)[0]
    if "DeferredMask" in message:
        return f" ({type(attention).__name__} computes with the mask itself, before attention)"
    if "arange" in inspect.unwrap(type(attention).forward).__code__.co_names:
        return f" ({type(attention).__name__} counts the tokens it is given, which are one group's, not the sequence's)"
    return ""


def _compare(trial: Trial, profile: Profile, correction: float = 0.0) -> None:
    """Raises UnsupportedModelError unless the patched model agrees with the definition."""
    tiny, batch, positions = trial.tiny, trial.batch, trial.positions
    what = f"{type(tiny).__name__}, {trial.side} padding" + (", gradient_correction" if correction else "")
    probabilities = torch.linspace(0.2, 1.0, positions.numel(), dtype=torch.float64).view(positions.shape)
    scales = probabilities**-correction if correction else None
    last_output = profile.rows is Rows.ALL
    definition = definition_of_the_method(tiny, positions, last_output=last_output, scales=scales)
    with definition, layer_outputs(tiny) as defined_layers:
        defined, defined_gradients = step(tiny, _selected_labels(trial), positions)
    real = batch.get("attention_mask", torch.ones(defined.shape[:2])).bool()
    per_token = defined.shape[:2] == real.shape and defined.ndim == 3
    seen = real if per_token else slice(None)
    agree(defined[seen], trial.untouched[seen], f"{what}: outputs of its own attention function")
    try:
        with patched(tiny, profile=profile, gradient_correction=correction), layer_outputs(tiny) as found_layers:
            given = {"selected_positions": positions, "selection_probabilities": probabilities}
            found, gradients = step(tiny, batch | given, positions)
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code may raise anything on a part of a sequence
        raise UnsupportedModelError(f"{what} fails on groups of tokens: {type(error).__name__}: {error}") from error
    rows = torch.arange(len(positions))[:, None]
    if per_token:
        seen = real[rows, positions]
        for index, (one, other) in enumerate(zip(found_layers[:-1], defined_layers[:-1], strict=True)):
            agree(one[seen], other[rows, positions][seen], f"{what}: outputs of layer {index}")
    if per_token and not last_output:
        defined = defined[rows, positions]
    elif per_token:
        seen = real
    agree(found[seen], defined[seen], f"{what}: outputs of the last layer or the head")
    agree_on_gradients(gradients, defined_gradients, what)


def _why_whole_logits(trial: Trial, profile: Profile) -> str | None:
    """Compares the loss in chunks of two rows with the whole loss. Returns what is wrong with it, or None."""
    tiny, gradients = trial.tiny, []
    if reason := why_not_in_chunks(tiny, profile):
        return reason
    two_rows = 2 * 4 * tiny.config.get_text_config().vocab_size
    try:
        for chunked in (False, True):
            with patched(tiny, profile=profile, chunked_loss=chunked, chunk_bytes=two_rows):
                gradients.append(step(tiny, trial.batch | {"selected_positions": trial.positions}, trial.positions)[1])
        agree_on_gradients(gradients[1], gradients[0], "in chunks")
    except Exception as error:  # the model's own code may raise anything on no rows
        return f"the loss of {type(tiny).__name__} differs in chunks, or fails: {str(error).splitlines()[0]}"
    return None


def verify_chunked_loss(model: PreTrainedModel) -> None:
    """Compares the loss in chunks, of all tokens of a tiny copy of `model`, with the whole loss.

    Raises UnsupportedModelError with the reason why this model's loss cannot be taken in chunks.
    """
    if reason := why_not_in_chunks(model, Profile(Rows.SELECTED, None)):
        raise UnsupportedModelError(reason)
    with undisturbed():
        try:
            trial = make_trial(tiny_copy(model), "right")
            _, whole = step(trial.tiny, trial.batch, trial.positions)
            take_loss_in_chunks(trial.tiny, chunk_bytes=2 * 4 * trial.tiny.config.get_text_config().vocab_size)
            _, in_chunks = step(trial.tiny, trial.batch, trial.positions)
            agree_on_gradients(in_chunks, whole, "in chunks")
        except Exception as error:  # the model's own code may raise anything on no rows
            raise UnsupportedModelError(
                f"the loss of {type(model).__name__} differs in chunks, or fails: {str(error).splitlines()[0]}"
            ) from error


def _selected_labels(trial: Trial) -> dict[str, Tensor]:
    labels = trial.batch.get("labels")
    if labels is None or labels.ndim == 1 or labels.is_floating_point():
        return trial.batch
    masked = mask_unselected_labels(labels, trial.positions, causal=trial.tiny.can_generate())
    return trial.batch | {"labels": masked}


# --- the scoring pass -------------------------------------------------------------------------------------------------
#
# The definition is plain autograd. Scores come from the whole logits (B, S, V) and the whole attention weights
# (B, H, S, S) of the unmodified model, in which identities replace the layers that a shorter scoring pass leaves out.


def verify_scoring_pass(
    model: PreTrainedModel, profile: Profile, options: ScoringOptions, needs: tuple[str, ...]
) -> None:
    """The same for scoring passes of a causal `model`, and a step after one; the error tells what works without."""
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
