"""What the log says of a selection: shares that are counted, times by arithmetic, and when it is a warning."""

import pytest

from tokentune.data.inspection.selection_gain import Shares, Step, gain_of

PLAIN, LORA = Step(lora=False), Step(lora=True)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (PLAIN, (2 + 4 * 0.3) / 6),
        (LORA, (2 + 2 * 0.3) / 4),
        (Step(lora=False, checkpointing=True), (2 + 6 * 0.3) / 8),
        (Step(lora=True, checkpointing=True), (2 + 4 * 0.3) / 6),
        (Step(lora=False, scoring_pass=True), (2 + 6 * 0.3) / 6),
        (Step(lora=True, scoring_pass=True), (2 + 4 * 0.3) / 4),
    ],
)
def test_time_of_a_step(step: Step, expected: float) -> None:
    assert step.time(0.3) == pytest.approx(expected)
    assert Step(step.lora, step.checkpointing).time(1) == 1


def test_a_selection_beside_answers() -> None:
    said, warns = gain_of(Shares(answers=0.4, selected=0.3, learnt=0.51), PLAIN, "0.3")
    assert said == (
        "--prefix_length 0.3 selects 30% of the tokens, which predict 51% of the answers' tokens; by arithmetic, not "
        "measured, a step takes 0.53 of the time and about 0.30 of the activations of ordinary training. "
        "--prefix_length answers: 40%, all of the answers, 0.60 of the time and about 0.40 of the activations"
    )
    assert not warns


def test_answers_have_nothing_beside_them() -> None:
    said, warns = gain_of(Shares(0.05, 0.05, 1.0), LORA, "answers")
    assert said == (
        "--prefix_length answers selects 5% of the tokens, which predict all of the answers' tokens; by arithmetic, "
        "not measured, a step takes 0.53 of the time and about 0.05 of the activations of ordinary training"
    )
    assert not warns
    more, _ = gain_of(Shares(0.05, 0.15, 1.0), LORA, "answers+0.1")
    assert more.endswith(
        "--prefix_length answers: 5%, all of the answers, 0.53 of the time and about 0.05 of the activations"
    )
    assert "at most 15%" in gain_of(Shares(0.05, 0.15, 1.0), LORA, "answers+0.1:answers")[0]


@pytest.mark.parametrize(
    ("shares", "step", "prefix_length", "ending"),
    [
        (Shares(0.5, 0.9, 0.9), PLAIN, "0.9", "saves hardly any time: select fewer tokens, or leave --tokentune out"),
        (
            Shares(0.95, 0.95, 1.0),
            PLAIN,
            "answers",
            "saves hardly any time: select fewer tokens, or leave --tokentune out",
        ),
        (Shares(0.5, 0.7, 1.0), Step(False, scoring_pass=True), "0.7", "select fewer tokens, or leave --tokentune out"),
        (Shares(0.05, 0.3, 0.3), PLAIN, "0.3", "That is no more tokens and more of the answers: take it"),
    ],
)
def test_what_cannot_pay_is_a_warning(shares: Shares, step: Step, prefix_length: str, ending: str) -> None:
    said, warns = gain_of(shares, step, prefix_length)
    assert warns and said.endswith(ending)


def test_nearly_all_of_few_answers_is_no_warning() -> None:
    assert not gain_of(Shares(0.05, 0.3, 0.96), PLAIN, "0.3")[1]
    assert not gain_of(Shares(0.31, 0.3, 0.5), PLAIN, "0.3")[1]


def test_without_tokentune() -> None:
    said, warns = gain_of(Shares(0.084, 1.0, 1.0), PLAIN, None)
    assert said == (
        "8% of the tokens predict an answer's: --tokentune --prefix_length answers would select these alone; by "
        "arithmetic, not measured, a step would take 0.39 of the time and about 0.08 of the activations"
    )
    assert not warns
    assert gain_of(Shares(0.2, 1.0, 1.0), PLAIN, None) is None
    assert gain_of(Shares(0.0, 0.3, 0.0), PLAIN, "0.3") is None


def test_of_activations_nothing_is_said_with_checkpointing() -> None:
    said, _ = gain_of(Shares(0.1, 1.0, 1.0), Step(False, checkpointing=True), None)
    assert said.endswith("a step would take 0.33 of the time")


@pytest.mark.parametrize(
    ("share", "shown"), [(0.004, "0.40%"), (0.01, "1%"), (0.994, "99%"), (0.998, "99.80%"), (1.0, "all"), (0.0, "none")]
)
def test_no_share_is_rounded_to_all_or_none(share: float, shown: str) -> None:
    assert f"which predict {shown} of" in gain_of(Shares(0.5, 0.3, share), PLAIN, "0.3")[0]
