"""What rows cost, by their tokens and their selected ones: exact counts, and what batches really select."""

import pytest
from datasets import Dataset

from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.packing import PackedRows
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.data.step_work import selected_of, selected_units, units_of_rows
from tokentune.settings.classification import LabelledSelectionArguments
from tokentune.settings.model import SelectionArguments

SHAPES = [(20, 2), (20, 10), (11, 0), (6, 5), (1, 0)]  # tokens and target positions of each row


def row(length: int, targets: int) -> dict[str, list[int]]:
    ids = list(range(3, 3 + length))
    return {"input_ids": ids, "labels": [-100] * (length - targets) + ids[length - targets :]}


ROWS = [row(*shape) for shape in SHAPES]


def selection(words: str) -> SelectionArguments:
    size, *strategy = words.split()
    given = {"selection": strategy[0]} if strategy else {}
    return SelectionArguments(tokentune=True, prefix_length=size, **given)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("answers", [2, 10, 1, 5, 1]),
        ("answers+0.5", [11, 15, 6, 6, 1]),  # 2 + 9, 10 + 5, 5.5 and 0.5 round up
        ("answers+0.5:answers", [11, 15, 6, 6, 1]),  # there has to be room for these
        ("0.3", [6, 6, 3, 2, 1]),
        ("8", [8, 8, 8, 6, 1]),
        ("0.3 reference", [7, 7, 4, 3, 1]),  # the first, the last, and of those between 5.4, 2.7 and 1.2
    ],
)
def test_selected_tokens_of_each_row(words: str, expected: list[int]) -> None:
    arguments = selection(words)
    for rows in (ROWS, Dataset.from_list(ROWS)):
        lengths, targets = lengths_of(rows), target_counts_of(rows, causal=True)
        assert targets.tolist() == [targets for _, targets in SHAPES]
        assert selected_of(lengths, targets, arguments).tolist() == expected
    collate, seeded = CausalCollator(0, arguments.selected, arguments.selection), SeededRows(ROWS, seed=1)
    assert [collate([seeded[n]])["selected_positions"].shape[1] for n in range(len(ROWS))] == expected


@pytest.mark.parametrize(("lora", "selected"), [(False, 4), (True, 2)])
def test_what_rows_cost(lora: bool, selected: int) -> None:
    def found(arguments: SelectionArguments, rows: object = ROWS) -> list[list[int]]:
        return units_of_rows(SeededRows(rows, 0), arguments, lora=lora, causal=True).tolist()

    lengths = [length for length, _ in SHAPES]
    assert found(SelectionArguments()) == [[2 * n, selected * n] for n in lengths]  # all tokens
    counts = [2, 10, 1, 5, 1]
    expected = [[2 * n, selected * k] for n, k in zip(lengths, counts, strict=True)]
    assert found(selection("answers")) == found(selection("answers"), Dataset.from_list(ROWS)) == expected
    packed = PackedRows(SeededRows(ROWS, 0), [[0, 3], [1], [2, 4]])
    of_packed = units_of_rows(packed, selection("answers"), lora=lora, causal=True)
    assert of_packed.tolist() == [[2 * 26, selected * 7], expected[1], [2 * 12, selected * 2]]


def test_words_have_their_own_label() -> None:
    """The first token's counts too, where no label belongs to the token before it."""
    words = [
        {"input_ids": [3] * 6, "labels": [1, -100, 0, -100, -100, -100]},
        {"input_ids": [3, 4], "labels": [-100, 2]},
    ]
    arguments = LabelledSelectionArguments(tokentune=True, prefix_length="answers")
    assert units_of_rows(SeededRows(words, 0), arguments, lora=False, causal=False).tolist() == [[12, 8], [4, 4]]
    texts = [{"input_ids": [3] * 6, "labels": 1}, {"input_ids": [3] * 3, "labels": 0}]  # a class for each
    proportion = LabelledSelectionArguments(tokentune=True, prefix_length="0.5")
    assert units_of_rows(SeededRows(texts, 0), proportion, lora=False, causal=False).tolist() == [[12, 12], [6, 8]]


def test_repeated_forward_passes_are_of_the_selected_tokens() -> None:
    assert [selected_units(lora=lora, again=again) for lora in (False, True) for again in (0, 1)] == [4, 6, 2, 4]
