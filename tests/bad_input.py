"""What the tests of bad input share: a command run in this process, and the sentence that it ends with.

A table's rows are (name, words of the command line, sentence). In words and sentences `{tmp}`, `{model}` and `{data}`
stand for the test's own folder, a good model's and good data. A sentence that ends in `...` goes on with something
that another package words; every other one is compared whole.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tokentune.cli.command import run_command


def no_weights(*args: object, **kwargs: object) -> None:
    """In the place of what loads weights: bad input is refused before that."""
    raise AssertionError("weights were about to be loaded")


def refusal(
    main: Callable[[Sequence[str]], None],
    given: dict[str, object],
    words: Sequence[object],
    folder: Path,
    capsys: pytest.CaptureFixture,
) -> str:
    """Runs a command on good input, `given`, with the flags in `words` instead or besides; checks that it is refused.

    Refused: exit code 2, at most three lines on stderr after the warnings, no traceback, nothing in `folder` changed.

    Returns:
        The message, without `error: ` before and the line's end after it.
    """
    flags = {str(word).split("=")[0] for word in words}
    kept = [str(word) for flag, value in given.items() if flag not in flags for word in (flag, value)]
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main([*kept, *map(str, words)]))
    assert ended.value.code == 2
    assert contents(folder) == before
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    message = stderr[stderr.index("error: ") :].removeprefix("error: ")
    assert message.endswith("\n")
    assert len(message.splitlines()) <= 3
    assert max(map(len, message.splitlines())) < 900
    return message.removesuffix("\n")


def contents(folder: Path) -> list[tuple[str, int]]:
    """Paths and sizes below a folder."""
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))


def check_sentence(message: str, sentence: str, **places: object) -> None:
    """Compares a message with a table's sentence."""
    expected = filled(sentence, **places)
    if expected.endswith("..."):
        assert message.startswith(expected.removesuffix("..."))
    else:
        assert message == expected


def filled(text: str, **places: object) -> str:
    """The text with `{tmp}` and the like replaced; other braces stay."""
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text
