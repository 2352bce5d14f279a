"""The method. All tokens run forward; inside the layers only the selected ones have gradients and save activations.

    B sequences, S tokens, K selected, R = S - K unselected, D hidden size, H heads, G key-value heads, d head size

Attention is the only part of a transformer layer where tokens meet. So each layer runs its own, unmodified `forward`
twice, once for each group of tokens, and the two passes meet in attention. The second pass is nested in the attention
call of the first one:

    (B, S, D) from the embedding            split: TokenGroups(selected (B, K, D), unselected (B, R, D))
    layer(TokenGroups)                      enter_layer: forward gets the selected rows, and their rows of its arguments
      layer.forward(selected)               with gradients
        norm, projections                   q, k, v of the selected tokens
        attention(q, k, v)                  selective_attention: stores k, v; then starts the other pass
          layer.forward(unselected)         run_unselected: under no_grad
            norm, projections               q', k', v' of the unselected tokens
            attention(q', k', v')           selective_attention: joins k, k' and v, v' in sequence order (B, G, S, d)
              q' attends to all tokens      all keys and values are constants
            output projection, MLP
          q attends to all tokens           gradients reach k and v; k' and v' are constants
        output projection, MLP
    TokenGroups to the next layer           leave_layer: packs both outputs
    (B, K, D) from the last layer           final norm and head run on the selected rows alone (for others see `Rows`)
    loss at the K positions                 each predicts the next token of the original sequence (`core/loss.py`)

Whatever else is in a layer (LoRA, 4-bit weights, experts, any order of norms) just runs, once per group. In the last
layer only the keys and values of the unselected tokens are needed, so their pass ends there. `test_selective.py`
compares outputs and gradients with an independent definition of the method (Simoulin et al., EMNLP 2024, section 3).

Rows of a batch may select different numbers of tokens. Those with fewer are filled up to K with padding or, where
they have none left, with tokens that get no gradient (`Step.constant_at_fillers`).

Everything else joins in at few points: masks at `Step.mask_rows`; the gradient's correction at `join_key_values` and
`Step.own_tokens`; checkpointing and the scoring pass, which replace `LayerCall.unselected_pass`; hooks of others on a
layer, for which `StepPlan.all_rows_between_layers` makes the layers pass on (B, S, D).
"""

from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.attention.correction import scale_gradient
from tokentune.core.attention.kernels import attend
from tokentune.core.attention.skipped_queries import skipped_query_projections
from tokentune.core.compat.bypassed_hooks import require_ordinary_call
from tokentune.core.groups import TokenGroups, gather_tokens, in_sequence_order
from tokentune.core.profile import Rows
from tokentune.core.step import (
    CURRENT_STEP,
    SELECTED,
    UNSELECTED,
    LayerCall,
    PassDone,
    Step,
    uncompiled,
    uncompiled_alone,
)
from tokentune.errors import UnsupportedModelError


def split(step: Step, hidden: Tensor) -> TokenGroups:
    """(B, S, D) in front of a layer -> the two groups. The unselected one is constant; empty if its pass is cached."""
    if step.order is None:
        step.set_positions(hidden)
    selected = gather_tokens(hidden, step.indices(SELECTED))  # (B, K, D)
    if step.plan.cached_kv is not None:
        return TokenGroups(selected, hidden.new_empty(len(hidden), 0, *hidden.shape[2:]))
    return TokenGroups(selected, gather_tokens(hidden.detach(), step.indices(UNSELECTED)))


def merge(step: Step, groups: TokenGroups) -> Tensor:
    """The two groups -> (B, S, D) in sequence order."""
    return gather_tokens(torch.cat(groups, dim=1), step.order.argsort(dim=1).to(groups.selected.device))


@uncompiled
def enter_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of every layer: its own forward gets the selected rows, and their rows of its arguments."""
    step = CURRENT_STEP.get()
    kwargs = dict(kwargs)
    hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), ())
    if step is None:
        require_ordinary_call(hidden, kwargs)
        return None
    if any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past")):
        raise UnsupportedModelError("a key-value cache reached a layer: both passes would write to it")
    between = step.plan.all_rows_between_layers
    if step.entered_calls > 0 and not (isinstance(hidden, TokenGroups) or between):
        raise UnsupportedModelError(f"something in front of {type(layer).__name__} took the groups of tokens apart")
    groups = hidden if isinstance(hidden, TokenGroups) else split(step, hidden)
    step.entered_calls += 1
    last = step.entered_calls == step.expected_calls
    ends_early = last and step.plan.rows is not Rows.ALL and not between
    step.call = LayerCall(layer, last, groups, args, kwargs, torch.is_grad_enabled(), step.unselected_pass, ends_early)
    return (groups.selected, *step.rows_of(args, SELECTED)), step.rows_of(kwargs, SELECTED)


@uncompiled_alone
def selective_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """What a model's attention calls during a selective forward, for either group of Q = K or R tokens.

    Args: query (B, H, Q, d), key and value (B, G, Q, d); `attention_mask` as the model made it; `options` as in the
    model's own call. Returns the attention output (B, Q, H, d), and None in place of the weights.
    Raises UnsupportedModelError where the layer does more than one self-attention over its own tokens.
    """
    step = CURRENT_STEP.get()
    call = step.call
    if call is None:
        raise UnsupportedModelError(f"{type(module).__name__} attends outside of the layers")
    group = call.running
    if key.shape[2] != step.indices(group).shape[1]:
        raise UnsupportedModelError(f"{type(module).__name__} attends to keys that are not the layer's own tokens")
    if group == SELECTED:
        if call.selected_kv is not None:
            raise UnsupportedModelError(f"{type(call.layer).__name__} calls attention more than once")
        call.selected_kv = key, value = step.constant_at_fillers(key), step.constant_at_fillers(value)
        if step.indices(UNSELECTED).shape[1] > 0:
            call.unselected_pass(step, call)  # `run_unselected`: reaches the branch below, and sets `joined_kv`
        else:
            join_key_values(step, call)
        keys, values = call.joined_kv  # (B, G, S, d)
    else:
        call.unselected_kv = key, value
        join_key_values(step, call)
        if call.unselected_ends_early:
            raise PassDone
        keys, values = (joined.detach() for joined in call.joined_kv)
    implementation, causal = step.own_attention(module, options)
    mask = step.mask_rows(attention_mask, causal, group, query)
    own = step.own_tokens(call) if group == SELECTED else None
    return uncompiled(attend)(module, query, keys, values, mask, implementation, own=own, **options)


@uncompiled_alone
def run_unselected(step: Step, call: LayerCall) -> None:
    """The unselected tokens' pass through the layer, started inside the attention of the selected ones.

    It calls `forward`, not the layer itself: hooks on the layer run once per call of the layer.
    """
    args, kwargs = step.rows_of(call.args, UNSELECTED), step.rows_of(call.kwargs, UNSELECTED)
    queries = skipped_query_projections(call.layer) if call.unselected_ends_early else nullcontext()
    call.running = UNSELECTED
    try:
        with suppress(PassDone), torch.no_grad(), queries:
            output = call.layer.forward(call.groups.unselected, *args, **kwargs)
            call.unselected_output = output[0] if isinstance(output, tuple) else output  # (B, R, D)
    finally:
        call.running = SELECTED


@uncompiled
def join_key_values(step: Step, call: LayerCall) -> None:
    """The keys and values of both groups, for both passes: 2 x (B, G, S, d). Gradients reach the selected ones."""
    with torch.set_grad_enabled(call.with_gradients):  # this runs inside the `no_grad` of the unselected tokens' pass
        selected, scales = call.selected_kv, step.plan.gradient_scales
        if scales is not None:
            selected = tuple(scale_gradient(kv, scales) for kv in selected)
        if call.unselected_kv is None:  # every token is selected
            call.joined_kv = selected
            return
        flat_indices = step.flat_indices(call.selected_kv[0].device)
        pairs = zip(selected, call.unselected_kv, strict=True)
        call.joined_kv = tuple(in_sequence_order(*pair, flat_indices) for pair in pairs)


@uncompiled
def leave_layer(layer: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of every layer: packs both groups, or makes what leaves the last layer (`Rows`)."""
    step = CURRENT_STEP.get()
    if step is None:
        return None
    call, step.call = step.call, None
    if call.selected_kv is None:
        raise UnsupportedModelError(f"{type(layer).__name__} does not send its attention through the interface")
    hidden, *others = output if isinstance(output, tuple) else (output,)
    if call.last or step.plan.all_rows_between_layers:
        hidden = step.constant_at_fillers(hidden)
    if call.last and step.plan.rows is Rows.SELECTED:
        leaving = hidden
    else:
        unselected = call.unselected_output
        if unselected is None:  # ended early, or cached: zeros stand for these rows where all rows leave the last layer
            count = step.indices(UNSELECTED).shape[1] if call.last else 0
            unselected = hidden.new_zeros(len(hidden), count, *hidden.shape[2:])
        groups = TokenGroups(hidden, unselected)
        leaving = merge(step, groups) if call.last or step.plan.all_rows_between_layers else groups
    return (leaving, *others) if isinstance(output, tuple) else leaving
