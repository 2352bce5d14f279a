"""What a forward pass will do, decided from the selection, the inputs and the state of the model; no model is needed.

B sequences, S tokens, K selected
"""

from collections import deque
from dataclasses import replace

import pytest
import torch

from tokentune import UnsupportedModelError
from tokentune.core.profile import Profile, Rows
from tokentune.core.step_plan import Batch, Loss, ModelState, StepPlan, plan_step, selects_all

POSITIONS = torch.tensor([[0, 2, 3], [1, 2, 4]])
IDS = torch.arange(10).view(2, 5)
LABELS = torch.tensor([[-100, 11, 12, 13, 14], [-100, -100, 22, 23, 24]])
BATCH = Batch.of({"input_ids": IDS, "labels": LABELS})
EVERY = torch.arange(5).expand(2, 5)
SERVED = ModelState(Profile(Rows.SELECTED, None))
WEIGHTS = torch.ones(2, 3)


def plan(state: ModelState = SERVED, positions: torch.Tensor = POSITIONS, **options: object):
    return plan_step(StepPlan(positions, **options), BATCH, state)


@pytest.mark.parametrize(
    ("changes", "options", "expected", "recomputed"),
    [
        ({}, {}, Loss.SELECTED, False),
        ({}, {"positions": EVERY}, Loss.UNCHANGED, False),
        ({"prefers_chunks": True}, {}, Loss.CHUNKED, True),
        ({"prefers_chunks": True}, {"positions": EVERY}, Loss.CHUNKED, True),
        ({"prefers_chunks": True, "chunked_loss": False}, {}, Loss.SELECTED, False),
        ({"prefers_chunks": True, "with_gradients": False}, {}, Loss.SELECTED, False),
        ({"prefers_chunks": True, "not_in_chunks": "why"}, {}, Loss.SELECTED, False),
        ({"chunked_loss": True}, {}, Loss.CHUNKED, True),
        ({}, {"weights": WEIGHTS}, Loss.CHUNKED, False),
        ({"chunked_loss": False, "with_gradients": False}, {"weights": WEIGHTS}, Loss.CHUNKED, False),
        ({"prefers_chunks": True}, {"weights": WEIGHTS}, Loss.CHUNKED, True),
        ({"token_labels": False}, {}, Loss.UNCHANGED, False),
    ],
)
def test_how_the_loss_is_taken(changes: dict, options: dict, expected: Loss, recomputed: bool) -> None:
    found = plan(replace(SERVED, **changes), **options)
    assert (found.loss, found.recompute_logits) == (expected, recomputed)
    assert "labels" not in found.replaced


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"chunked_loss": True, "not_in_chunks": "the reason"}, None, "chunked_loss: the reason"),
        ({"not_in_chunks": "the reason"}, WEIGHTS, "selection_weights: the reason"),
        ({"causal": False}, WEIGHTS, "factors of a causal model's own losses"),
        ({"foreign_forward": True}, WEIGHTS, "factors of a causal model's own losses"),
        ({"token_labels": False}, WEIGHTS, "factors of a causal model's own losses"),
    ],
)
def test_losses_that_cannot_be_taken(changes: dict, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        plan(replace(SERVED, **changes), weights=weights)


def test_an_encoder_gets_the_labels_of_the_selected_positions() -> None:
    found = plan(replace(SERVED, causal=False))
    assert found.loss is Loss.UNCHANGED and found.rows is Rows.SELECTED
    assert found.replaced["labels"].tolist() == [[-100, 12, 13], [-100, 22, 24]]


def test_who_takes_the_loss_over_all_rows_gets_masked_labels() -> None:
    """A position t predicts the label at t + 1 in a causal model, and its own label otherwise."""
    causal = plan(replace(SERVED, foreign_forward=True))
    assert causal.loss is Loss.UNCHANGED and causal.rows is Rows.ALL
    assert causal.replaced["labels"].tolist() == [[-100, 11, -100, 13, 14], [-100, -100, 22, 23, -100]]
    encoder = plan(ModelState(Profile(Rows.ALL, None), causal=False))
    assert encoder.replaced["labels"].tolist() == [[-100, -100, 12, 13, -100], [-100, -100, 22, -100, 24]]
    assert LABELS[0, 1] == 11  # the caller's own stay


def test_what_the_draw_replaced_is_passed_on() -> None:
    found = plan(replaced={"num_items_in_batch": 3})
    assert found.replaced == {"num_items_in_batch": 3}


def test_all_selected_is_an_ordinary_pass_through_the_layers() -> None:
    found = plan(replace(SERVED, foreign_layer_hooks=True, gradient_correction=1.0), positions=EVERY)
    assert found.all_selected and found.gradient_scales is None and not found.all_rows_between_layers
    assert not selects_all(POSITIONS, IDS) and not selects_all(EVERY, None)
    assert selects_all(EVERY, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="distinct and ascending"):
        selects_all(EVERY.flip(1), IDS)


@pytest.mark.parametrize(
    ("rows", "leaving"),
    [(Rows.SELECTED, Rows.GATHERED), (Rows.GATHERED, Rows.GATHERED), (Rows.ALL, Rows.ALL)],
)
def test_foreign_hooks_on_layers_see_all_rows(rows: Rows, leaving: Rows) -> None:
    found = plan(ModelState(Profile(rows, None), foreign_layer_hooks=True))
    assert found.all_rows_between_layers and found.rows is leaving
    assert plan(ModelState(Profile(rows, None))).rows is rows


def test_a_scoring_pass_leaves_nothing_for_foreign_hooks() -> None:
    cached = deque([(torch.zeros(2, 1, 5, 4),) * 2])
    assert plan(cached_kv=cached).cached_kv is cached
    with pytest.raises(UnsupportedModelError, match="a scoring pass leaves no hidden states"):
        plan(replace(SERVED, foreign_layer_hooks=True), cached_kv=cached)


def test_scales_of_the_correction() -> None:
    """Probability ** -a; also where every token is selected, because it was drawn so by chance."""
    state = replace(SERVED, gradient_correction=0.5)
    known = torch.tensor([[0.25, 1.0, 0.04], [1.0, 0.01, 1.0]], dtype=torch.float64)
    scales = plan(state, probabilities=known).gradient_scales
    assert torch.allclose(scales, torch.tensor([[2.0, 1.0, 5.0], [1.0, 10.0, 1.0]], dtype=torch.float64), rtol=1e-15)
    every = plan(state, positions=EVERY, probabilities=torch.full((2, 5), 0.25))
    assert not every.all_selected and (every.gradient_scales == 2).all()
    assert plan(probabilities=known).gradient_scales is None
    assert plan(replace(state, with_gradients=False)).gradient_scales is None
    with pytest.raises(ValueError, match="gradient_correction needs selection_probabilities"):
        plan(state)
    with pytest.raises(UnsupportedModelError, match=r"gradient_correction needs them unless .* take answers\+0.1"):
        plan(replace(state, foreign_forward=True), weights=WEIGHTS, probabilities=known)


def test_fillers_have_no_loss_where_weights_say_so() -> None:
    fillers = torch.tensor([[True, False, False], [False, False, False]])
    for weights in (None, WEIGHTS):
        with pytest.raises(ValueError, match="selection_fillers must not be positions with a loss"):
            plan(fillers=fillers, weights=weights)
    assert plan(fillers=fillers, weights=(~fillers).float()).fillers is fillers


def test_images_are_planned_before_their_tokens_are_known() -> None:
    def draw(hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("drawn in front of the layers, not here")

    labels = torch.tensor([0, 1])
    found = plan_step(
        StepPlan(draw), Batch.of({"pixel_values": IDS, "labels": labels}), replace(SERVED, token_labels=False)
    )
    assert found.positions is draw and not found.all_selected and found.replaced == {}


def test_what_a_batch_takes_from_the_inputs() -> None:
    embeddings, mask = torch.zeros(2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    batch = Batch.of({"inputs_embeds": embeddings, "start_positions": torch.tensor([1, 2]), "end_positions": None})
    assert batch.tokens is embeddings and batch.input_ids is None and batch.has_labels and len(batch.answers) == 1
    assert torch.equal(batch.token_mask(), mask)
    assert not Batch.of({"input_ids": IDS}).has_labels
    left = Batch.of({"input_ids": IDS, "labels": LABELS, "attention_mask": mask.tril()})
    assert left.token_mask() is left.mask
    assert torch.equal(replace(left, mask=torch.ones(2, 1, 5, 5)).token_mask(), mask)
