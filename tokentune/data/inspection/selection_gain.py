"""What a selection holds of the answers and what a step costs with it, beside `--prefix_length answers`: one sentence.

The time is arithmetic (`data/step_work.py`), without padding; nothing is measured.
"""

from dataclasses import dataclass

from tokentune.data.step_work import FORWARD, selected_units

ANSWERS = "--prefix_length answers"
FEW = 0.2  # share of answer tokens below which selecting them alone is suggested
LEAST_SAVING = 0.1  # of a step's time
NEARLY_ALL = 0.95  # of the answers' tokens


@dataclass(frozen=True)
class Shares:
    """Of the training rows' tokens, from 0 to 1."""

    answers: float  # that predict a supervised token
    selected: float  # 1 without a selection
    learnt: float  # of those that predict a supervised token, the share that is selected


@dataclass(frozen=True)
class Step:
    """How a run steps, as far as its time depends on it."""

    lora: bool
    checkpointing: bool = False
    scoring_pass: bool = False

    def time(self, selected: float) -> float:
        """Of a step that selects this share, relative to one of ordinary training with the same flags."""
        whole = selected_units(lora=self.lora, again=self.checkpointing)
        own = selected_units(lora=self.lora, again=self.checkpointing + self.scoring_pass)
        return (FORWARD + own * selected) / (FORWARD + whole)

    def cost(self, selected: float) -> str:
        """In words."""
        # Checkpointing keeps little of the selected tokens, and of the others their keys and values.
        kept = "" if self.checkpointing else f" and about {selected:.2f} of the activations"
        return f"{self.time(selected):.2f} of the time{kept}"


def gain_of(shares: Shares, step: Step, prefix_length: str | None) -> tuple[str, bool] | None:
    """The sentence, and whether it is a warning; None: there is nothing to say.

    Args:
        shares: with `learnt` 1 and `selected` 1 where there is no selection.
        prefix_length: the flag's text; None: no --tokentune.
    """
    alone = Step(step.lora, step.checkpointing)  # answers take no scoring pass
    pays = alone.time(shares.answers) <= 1 - LEAST_SAVING
    if shares.answers == 0 or (prefix_length is None and shares.answers >= FEW):
        return None
    if prefix_length is None:
        return (
            f"{_percent(shares.answers)} of the tokens predict an answer's: --tokentune {ANSWERS} would select these "
            f"alone; by arithmetic, not measured, a step would take {alone.cost(shares.answers)}",
            False,
        )
    most = "at most " if ":" in prefix_length else ""
    said = (
        f"--prefix_length {prefix_length} selects {most}{_percent(shares.selected)} of the tokens, which predict "
        f"{_percent(shares.learnt)} of the answers' tokens; by arithmetic, not measured, a step takes "
        f"{step.cost(shares.selected)} of ordinary training"
    )
    if pays and prefix_length != "answers":
        said += f". {ANSWERS}: {_percent(shares.answers)}, all of the answers, {alone.cost(shares.answers)}"
    if step.time(shares.selected) > 1 - LEAST_SAVING:
        return f"{said}. This saves hardly any time: select fewer tokens, or leave --tokentune out", True
    if shares.learnt < NEARLY_ALL and shares.answers <= shares.selected:
        return f"{said}. That is no more tokens and more of the answers: take it", True
    return said, False


def _percent(share: float) -> str:
    if share in (0, 1):
        return "all" if share else "none"
    return f"{share:.0%}" if 0.01 <= share < 0.995 else f"{share:.2%}"
