"""The public functions: `apply_tokentune` verifies a model and patches it; `remove_tokentune` undoes that."""

import warnings

import torch
from transformers import PreTrainedModel

from tokentune.core.attention.correction import require_correctable
from tokentune.core.attention.kernels import require_served
from tokentune.core.checkpointing import CHECKPOINT_REST
from tokentune.core.compat.adapters import require_served_adapters, unserved_adapters
from tokentune.core.compat.four_bit import keep_4bit_layout
from tokentune.core.layers import transformer_layers
from tokentune.core.loss import why_not_in_chunks
from tokentune.core.patched import Model, Settings, owner_of, settings_of
from tokentune.core.patching import install, remove_tokentune
from tokentune.core.profile import SEQUENCE_HEADS, Pooling, Profile, Rows
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.independent import why_not_independent
from tokentune.sampling.resolver import find_strategy
from tokentune.sampling.sampler import require_drawing_beside_answers
from tokentune.sampling.schedule import Answers, Schedule, Size, parse_prefix_length
from tokentune.verify.verification import verified_profile, verify_correction, verify_scoring_pass

__all__ = ["apply_tokentune", "remove_tokentune"]


def apply_tokentune(
    model: Model,
    prefix_length: Size | str | None = None,
    *,
    selection: str = "supervised",
    verify: bool = True,
    checkpoint_rest: str = "auto",
    offload_kv: bool = False,
    chunked_loss: bool | None = None,
    scoring_pass: ScoringOptions | None = None,
    gradient_correction: float = 0.0,
    strategy: str | None = None,
    look: ScoringOptions | None = None,
) -> Model:
    """Patch this instance, a transformers model or a peft model around one, and return it.

    A second call replaces the settings of the first one.

    Afterwards `model(..., selected_positions=positions)`, with positions (B, K) int64, distinct and ascending in each
    row, runs the selective forward and returns K rows: logits (B, K, V), or last_hidden_state (B, K, D) from a model
    without a head. A causal model's loss is the mean over the selected positions whose next token is supervised (given
    `num_items_in_batch`: their sum divided by it, as everywhere in transformers). A caller that knows on the host how
    many such positions there are can pass `num_supervised=n`: on an accelerator a chunked loss then skips the others.
    `selection_fillers` (B, K) bool are selected positions that get no gradient and have no loss: they fill up the rows
    that select fewer than K tokens. `selection_weights` (B, K) are factors of the positions' losses, whose sum is then
    divided by the number of all supervised targets in `labels`, selected or not (or by `num_items_in_batch`).
    `selection_probabilities` (B, K) are those with which the positions were drawn, each independently of the others:
    `gradient_correction` needs them, and weights 1 / probability (`sampling.sampler.select_tokens`, `independent`).
    `all_labels` (B, S) are the labels from before a selection masked any: a scoring pass takes the loss over all of
    them.
    Without `selected_positions` the model is the original one, generation included, with one exception:

    Args:
        prefix_length: tokens per sequence to select, a count (int) or a proportion (float); or a text as of
            `--prefix_length`: "answers+0.1" for all tokens whose output has a loss and a tenth of the others (where
            the model is on an accelerator, the host waits for each draw of this kind). When given, the model draws the
            selection itself whenever it is in training mode and called with labels; with the uniform numbers
            `selection_draws` (B, S), where these are given.
        selection: which tokens, by what `--selection` takes: the name of a strategy, or "file.py:function".
        verify: first compare a tiny random copy with the definition of the method (`verify/verification.py`), and
            refuse adapters of kinds that were never compared (`core/compat/adapters.py`). Without it a model that
            cannot be served may be trained wrongly, without an error.
        scoring_pass: how a forward pass over all tokens, without gradients, scores them first (`core/scoring_pass.py`).
            Strategies that need scores get the default where this is None. Otherwise it gives the loss over all tokens
            (`last_draw`), and the step reuses its keys and values, also for given positions. Where the strategy knows
            its probabilities, the loss of a token has the weight 1 / probability.
        checkpoint_rest: what gradient checkpointing, once enabled on the model, saves of the tokens that are not
            selected: one of `tokentune.core.checkpointing.CHECKPOINT_REST`.
        offload_kv: save that in the CPU's memory, for a model on an accelerator.
        chunked_loss: whether a causal model's loss is taken a chunk of rows at a time (`core/loss.py`): its logits are
            then never in memory as a whole, and the output has none, (B, 0, V). None: in training, where it costs no
            time (frozen output embeddings, as with adapters) or gradient checkpointing prefers memory to time.
        gradient_correction: exponent a in [0, 1] of a less biased gradient (`core/attention/correction.py`): 0 is
            the method as published; 1 is exact in expectation, and varies more from draw to draw. The model then draws
            each token independently of the others, so that the number of selected tokens is random: by "random", or
            beside all targets ("answers+0.1").
        strategy, look: the old names of `selection` and `scoring_pass`, for one release.

    Forward hooks of others on a layer itself, before or after, see and may change all of its rows, (B, S, D), as in the
    original model. That costs copies of the rows, and the unselected tokens' pass through all of the last layer. Where
    such a hook mixes tokens, the unselected ones are constants. Modules inside a layer are called once per group, and
    so are hooks on them; what is behind the layers sees the selected rows. A warning names such hooks of others.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message names the part and the reason.
        ValueError: a value that an argument cannot have, or not beside another one.
    """
    if strategy is not None:
        warnings.warn("apply_tokentune(strategy=...) is now selection=...", DeprecationWarning, stacklevel=2)
        selection = strategy
    if look is not None:
        warnings.warn("apply_tokentune(look=...) is now scoring_pass=...", DeprecationWarning, stacklevel=2)
        scoring_pass = look if scoring_pass is None else scoring_pass
    owner = owner_of(model)
    require_served_adapters(unserved_adapters(owner, trust_unknown=not verify))
    if checkpoint_rest not in CHECKPOINT_REST:
        raise ValueError(f"checkpoint_rest must be one of {', '.join(CHECKPOINT_REST)}, not {checkpoint_rest!r}")
    require_correctable(gradient_correction, transformer_layers(owner))
    prefix_length = _size_of(prefix_length)
    if isinstance(prefix_length, Answers):
        _check_answers(selection, scoring_pass)
    draws = gradient_correction > 0 and prefix_length is not None
    if draws and (reason := why_not_independent(selection, prefix_length)):
        raise ValueError(f"gradient_correction: {reason}")
    before = settings_of(owner)
    if before is not None:
        profile = before.profile
    else:
        # A trainer may move the model to the accelerator later; each attention call checks its own device again.
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        for config in transformer_layers(owner).configs:
            require_served(config._attn_implementation, device)
        keep_4bit_layout(owner)
        profile = verified_profile(owner) if verify else _assumed_profile(owner)
    if verify and gradient_correction > 0.0 and (before is None or before.gradient_correction == 0.0):
        verify_correction(owner, profile)
    needs = find_strategy(selection).needs
    if scoring_pass is None and needs and prefix_length is not None:
        scoring_pass = ScoringOptions()
    for asked, what in ((chunked_loss, "chunked_loss"), (scoring_pass is not None, "a scoring pass")):
        if asked and (reason := why_not_in_chunks(owner, profile)):
            raise UnsupportedModelError(f"{what}: {reason}")
    if scoring_pass is not None:
        _check_scoring_pass(owner, scoring_pass, needs, checkpoint_rest)
        known = before is not None and before.scoring is not None and set(needs) <= set(before.needs)
        if verify and not (known and before.scoring.layers == scoring_pass.layers):
            verify_scoring_pass(owner, profile, scoring_pass, needs)
    settings = Settings(
        profile,
        transformer_layers(owner),
        prefix_length,
        selection,
        checkpoint_rest,
        offload_kv,
        chunked_loss,
        scoring=scoring_pass,
        needs=needs,
        gradient_correction=gradient_correction,
        verify=verify,
    )
    install(model, settings)
    return model


def _size_of(prefix_length: Size | str | None) -> Size | None:
    size = parse_prefix_length(prefix_length) if isinstance(prefix_length, str) else prefix_length
    if isinstance(size, Schedule):
        raise ValueError(f"prefix_length={prefix_length!r}: give one size, and others later by set_prefix_length")
    return size


def _check_answers(selection: str, scoring_pass: ScoringOptions | None) -> None:
    """Raises ValueError for what does not go with a selection of all targets."""
    require_drawing_beside_answers(selection)
    if scoring_pass is not None:
        raise ValueError("a scoring pass counts the loss over all targets, which all have their loss with answers")


def _check_scoring_pass(
    owner: PreTrainedModel, scoring_pass: ScoringOptions, needs: tuple[str, ...], checkpoint_rest: str
) -> None:
    """Raises ValueError for what a scoring pass cannot do with this model."""
    depth = len(transformer_layers(owner).layers)
    if scoring_pass.layers is not None and scoring_pass.layers >= depth:
        raise ValueError(
            f"a scoring pass through {scoring_pass.layers} of {depth} layers: leave `layers` out to run all of them"
        )
    if scoring_pass.layers is None and checkpoint_rest in ("hidden_states", "segments"):
        raise ValueError(
            f"checkpoint_rest={checkpoint_rest!r} keeps hidden states of the tokens that are not selected, which a "
            "scoring pass through all layers has none of: it keeps their keys and values"
        )
    if "excess_loss" in needs and scoring_pass.reference is None and not next(owner.parameters()).is_meta:
        raise ValueError("excess_loss is a loss minus that of another model: give ScoringOptions a reference")


def _assumed_profile(owner: PreTrainedModel) -> Profile:
    """The profile of most models, for one that is not verified: encoders pool the first token."""
    whole = owner.loss_type in SEQUENCE_HEADS
    pooler = any(name.split(".")[-1] == "pooler" for name, _ in owner.named_modules())
    return Profile(Rows.SELECTED, Pooling.FIRST if whole or pooler else None)
