"""The model card in a folder: whose it is."""

from pathlib import Path

from tokentune.file_names import CARD_NAME

MARK = "<!-- Written by TokenTune at the end of a run. Take this line out and the card is yours: it stays as it is. -->"


# peft fills an empty template whenever it saves an adapter.
_PEFT_TITLE, _PEFT_BLANK = "# Model Card for Model ID", "[More Information Needed]"


def own_card(folder: Path) -> str | None:
    """The text of a folder's card that is the user's own; None where there is none, or ours, or peft's empty one."""
    try:
        text = (folder / CARD_NAME).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    from_peft = _PEFT_TITLE in text and text.count(_PEFT_BLANK) > 10
    return None if MARK in text or from_peft else text
