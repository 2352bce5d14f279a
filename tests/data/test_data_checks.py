"""What is refused, and warned of, before a run: each by rows that have it, and by none that have not."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.cli.arguments import parse_arguments
from tokentune.data.encoding import EncodingReport
from tokentune.data.inspection.checks import check_data, look_at
from tokentune.data.inspection.row_statistics import draws, end_token_ids, row_statistics
from tokentune.data.instruction_data import InstructionData
from tokentune.errors import UserError
from tokentune.models.pretrained import load_tokenizer

REQUIRED = ["--model_name_or_path", "owner/model", "--dataset_name_or_path", "owner/data", "--report_to", "none"]
BOS, EOS, VOCABULARY = 1, 2, 90


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_llama_dir))


def row(
    length: int = 12, prompt: int = 5, *, start: tuple[int, ...] = (BOS,), end: int | None = EOS, seed: int = 0
) -> dict:
    ids = [*start, *np.random.default_rng([length, prompt, seed]).integers(3, VOCABULARY, length).tolist()][:length]
    ids = ids if end is None else [*ids[:-1], end]
    return {"input_ids": ids, "labels": ([-100] * prompt + ids[prompt:])[:length]}


def good(count: int = 20, **changes: Any) -> list[dict]:
    return [row(8 + number, seed=number, **changes) for number in range(count)]


def found(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    words: str = "",
    validation: list[dict] | None = None,
    report: EncodingReport | None = None,
) -> tuple[list[str], list[str]]:
    """Refusals and warnings of training rows."""
    arguments = parse_arguments([*REQUIRED, "--global_batch_size", "4", *words.split()])
    reports = report, None if validation is None else EncodingReport(rows=len(validation))
    evaluated = None if validation is None else Dataset.from_list(validation)
    data = InstructionData(Dataset.from_list(rows), evaluated, *reports)
    findings = look_at(data, tokenizer, arguments, VOCABULARY)
    return findings.refusals, findings.warnings


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_each_row(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [
        row(),
        {"input_ids": [BOS, BOS, 5, 95, -1], "labels": [BOS, -100, 5, 95, EOS]},
        {"input_ids": [], "labels": []},
        {"input_ids": [BOS], "labels": [BOS]},
        row(9, 9, end=None),
        row(),
    ]
    for table in (rows, Dataset.from_list(rows), Dataset.from_list([*rows[::-1]]).select(range(5, -1, -1))):
        found = row_statistics(table, tokenizer, VOCABULARY)
        assert found.lengths.tolist() == [12, 5, 0, 1, 9, 12]
        assert found.supervised.tolist() == [7, 3, 0, 0, 0, 7]  # nothing predicts the first token
        assert found.turns.tolist() == [1, 1, 0, 0, 0, 1]
        assert found.last_ended.tolist() == [True, True, False, False, False, True]
        assert found.outside.tolist() == [0, 2, 0, 0, 0, 0]
        assert found.doubled_bos.tolist() == [False, True, False, False, False, False]
        assert found.fingerprints[0] == found.fingerprints[5]
        assert len(set(found.fingerprints.tolist())) == 5


def test_fingerprints_tell_order_and_ends_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [[3, 4], [4, 3], [3, 4, 0], [0, 3, 4], [3], [4], [7]]
    table = [{"input_ids": ids, "labels": ids} for ids in rows]
    assert len(set(row_statistics(table, tokenizer, VOCABULARY).fingerprints.tolist())) == len(rows)


def test_ends_are_eos_and_marks_of_turns(tokenizer: PreTrainedTokenizerBase, tiny_llama_dir: Path) -> None:
    assert end_token_ids(tokenizer) == {EOS}
    chat = load_tokenizer(str(tiny_llama_dir))
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.add_tokens(["word"])
    assert end_token_ids(chat) == {EOS, chat.convert_tokens_to_ids("<|im_end|>")}


def test_draws_are_those_of_the_first_epoch() -> None:
    from tokentune.data.collators import CausalCollator, SeededRows

    rows = SeededRows(good(), 7)
    sample, selected, learnt = draws(rows, 0.3, "random")
    assert sample.tolist() == list(range(20))
    collator = CausalCollator(0, prefix_length=0.3)
    counts = [collator.count(collator([rows[n]])) for n in range(20)]
    assert selected.tolist() == [int(count[1]) for count in counts]
    assert learnt.tolist() == [int(count[2]) for count in counts]


def test_a_hundred_thousand_rows_are_looked_at_by_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    """No time is promised; a loop over rows in Python would hold every list of them, which this does not."""
    table = Dataset.from_list(good()).select(list(range(20)) * 5000)
    found = row_statistics(table, tokenizer, VOCABULARY)
    assert len(found) == 100_000
    assert found.lengths.sum() == 5000 * sum(len(r["input_ids"]) for r in good())
    assert len(np.unique(found.fingerprints)) == 20


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["", "--tokentune --prefix_length 0.3", "--packing", "--packing --tokentune --prefix_length 0.3"]
)
def test_good_data_passes_without_a_word(tokenizer: PreTrainedTokenizerBase, words: str) -> None:
    report = EncodingReport(records=25, rows=20, cut_rows=9, cut_ends=9, dropped_rows=2, dropped_long_rows=3)
    validation = good(5, start=(BOS, 8))
    assert found(tokenizer, good(), words + " --max_length 64", validation, report) == ([], [])


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (good(prompt=30), "", r"the training data has 20 rows and no supervised token.*--preview"),
        (
            [*good(), row(start=(BOS, VOCABULARY))],
            "",
            r"training row 21 holds a token .* no embedding for \(1 rows do\): .* the model 90 embeddings",
        ),
        (
            [row(), *good(3, start=(BOS, BOS))],
            "",
            r"3 of 4 training rows begin with two <s> \(the first: row 2\)",
        ),
        (
            [row(12, 10, seed=n) for n in range(20)],  # two targets; the released draw never takes the second one
            "--tokentune --prefix_length 1 --selection reference",
            r"--prefix_length 1: the selection misses every supervised token in .* --selection random",
        ),
    ],
)
def test_what_would_waste_a_run_is_refused(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict], words: str, message: str
) -> None:
    refusals, _ = found(tokenizer, rows, words)
    assert len(refusals) == 1
    arguments = parse_arguments([*REQUIRED, *words.split()])
    data = InstructionData(Dataset.from_list(rows), None, None, None)
    with pytest.raises(UserError, match=message) as raised:
        check_data(data, tokenizer, arguments, VOCABULARY)
    assert len(str(raised.value).splitlines()) <= 3


def test_validation_rows_are_looked_at_too(tokenizer: PreTrainedTokenizerBase) -> None:
    (refusal,), _ = found(tokenizer, good(), validation=[row(5, 5)])
    assert refusal.startswith("the validation data has 1 rows and no supervised token")
    (refusal,), _ = found(tokenizer, good(), validation=[row(seed=3), row(start=(BOS, -1))])
    assert refusal.startswith("validation row 2 holds a token that the model has no embedding for")


# ---- what is warned of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (
            good(end=None),
            "",
            "20 of the 20 training rows shorter than --max_length end without a supervised end token (</s>)",
        ),
        (good(end=None), "", "add --add_eos_token"),
        (good(end=None), "--add_eos_token", "the chat template has to end an answer with one"),
        ([*good(200), row(start=(BOS, BOS))], "", "1 of 201 training rows begin with two <s> (the first: row 201)"),
        ([*good(3), *[row(6, 6)] * 5], "", "5 of 8 training rows have no supervised token: they cost time"),
        (good(3), "", "3 rows are fewer than --global_batch_size 4: each optimizer step takes all of them, and the "),
        (good(3), "--num_epochs 2", "the run has 2 steps"),
        (good(9), "--packing --max_length 512", "1 packed rows are fewer than --global_batch_size 4"),
        (good(6), "--packing --max_length 14", "no two rows fit into --max_length 14 together"),
        (
            good(),
            "--packing --max_length 40 --tokentune --prefix_length 3",
            "a proportion such as 0.3 needs hardly any padding",
        ),
    ],
)
def test_what_may_not_be_meant_is_told(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict], words: str, message: str
) -> None:
    refusals, warnings = found(tokenizer, rows, words)
    assert refusals == []
    (warning,) = [warning for warning in warnings if message in warning]
    assert warnings == [warning]


def answered(tokenizer: PreTrainedTokenizerBase, *answers: str) -> tuple[list[str], list[str]]:
    """Refusals and warnings of rows with other questions and these answers."""
    rows = []
    for number, text in enumerate(answers):
        prompt, ids = row(8, 8, end=None, seed=number), tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt["input_ids"] + ids, "labels": prompt["labels"] + ids})
    arguments = parse_arguments([*REQUIRED, "--global_batch_size", "2"])
    data = InstructionData(Dataset.from_list(rows), None, None, None)
    findings = look_at(data, tokenizer, arguments, len(tokenizer))
    return findings.refusals, findings.warnings


@pytest.mark.parametrize("answers", [["</s>"] * 6, ["</s>", " </s>", "\n\n</s>", "</s>"], [" ", "\n", "\t \n"]])
def test_answers_that_are_all_empty_are_refused(tokenizer: PreTrainedTokenizerBase, answers: list[str]) -> None:
    (refusal,), warnings = answered(tokenizer, *answers)
    assert refusal.startswith(f"every answer of the {len(answers)} training rows is empty or blank: there is nothing")
    assert not any("same answer" in warning for warning in warnings)  # said once


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["</s>", "1</s>", "2</s>"], "1 of 3 training rows have an empty or blank answer: they teach to end at once"),
        ([f"{n}</s>" for n in range(19)] + ["</s>"], None),  # an exception
        (["yes</s>", "no</s>"] * 3, None),
        (["yes</s>"] * 6, "all 6 training rows have the same answer: the model learns to give it, whatever it is"),
        (["yes</s>"], None),
        ([f"{' ' * 40}{n}</s>" for n in range(4)], None),
    ],
)
def test_empty_and_equal_answers_are_told(
    tokenizer: PreTrainedTokenizerBase, answers: list[str], said: str | None
) -> None:
    refusals, warnings = answered(tokenizer, *answers)
    warnings = [warning for warning in warnings if "fewer than --global_batch_size" not in warning]
    assert refusals == [] and len(warnings) == (said is not None)
    assert said is None or warnings[0].startswith(said)


def test_special_tokens_may_be_answers(tiny_llama_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|yes|>", "<|no|>"]})
    assert answered(tokenizer, *["<|yes|></s>", "<|no|></s>"] * 4) == ([], [])


def test_empty_answers_of_chats_and_of_validation(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"input_ids": [BOS, 5, EOS, 6 + n, EOS], "labels": [-100, -100, EOS, -100, EOS]} for n in range(4)]
    (refusal,), _ = found(tokenizer, rows)
    assert refusal.startswith("every answer of the 4 training rows")
    (refusal,), _ = found(tokenizer, good(), validation=rows)
    assert refusal.startswith("every answer of the 4 validation rows")


def turns(*ends: int, seed: int = 0) -> dict:
    """A row of a question and an answer for each of the given last tokens of answers."""
    parts = [row(8, 4, start=(BOS,) if n == 0 else (), end=end, seed=9 * seed + n) for n, end in enumerate(ends)]
    return {name: [value for part in parts for value in part[name]] for name in ("input_ids", "labels")}


def test_answers_that_other_messages_follow_are_counted_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    told = "training rows that other messages follow end without a supervised end token (</s>)"
    for ends, number in (((9, 9, EOS), "12 of the 12"), ((9, EOS, EOS), "0"), ((EOS, 9, 9, EOS), "12 of the 18")):
        _, warnings = found(tokenizer, [turns(*ends, seed=n) for n in range(6)])
        expected = [] if number == "0" else [f"{number} answers of {told}"]
        assert [w.split(":")[0] for w in warnings] == expected
    _, warnings = found(tokenizer, [turns(EOS, EOS, 9, seed=n) for n in range(6)])  # the last one alone
    assert len(warnings) == 1 and warnings[0].startswith(
        "6 of the 6 training rows shorter than --max_length end without"
    )
    _, warnings = found(tokenizer, [turns(9, 9, seed=n) for n in range(6)])
    assert len(warnings) == 2 and warnings[1].startswith("6 of the 6 answers of training rows")


def test_rows_that_are_cut_need_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*good(3), *[row(30, end=None, seed=n) for n in range(9)]]
    assert found(tokenizer, rows, "--max_length 30") == ([], [])
    assert len(found(tokenizer, rows, "--max_length 31")[1]) == 1


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (EncodingReport(rows=20, cut_rows=11, cut_ends=11), "11 of 20 training rows are longer than --max_length 1024"),
        (
            EncodingReport(records=41, rows=20, dropped_rows=21),
            "21 of 41 training records are left out, because their",
        ),
        (
            EncodingReport(records=41, rows=20, dropped_long_rows=21),
            "21 of 41 training records are left out, because they",
        ),
    ],
)
def test_most_rows_lost_is_told(tokenizer: PreTrainedTokenizerBase, report: EncodingReport, message: str) -> None:
    refusals, (warning,) = found(tokenizer, good(), report=report)
    assert refusals == [] and warning.startswith(message)


def test_validation_rows_that_are_trained_on_are_told(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = good()
    _, (warning,) = found(tokenizer, rows, validation=[rows[3], row(seed=99), rows[5]])
    assert warning.startswith("2 of 3 validation rows are in the training data too")


def test_warnings_reach_the_log(tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    data = InstructionData(Dataset.from_list(good(end=None)), None, None, None)
    with caplog.at_level(logging.WARNING, logger="tokentune"):
        findings = check_data(data, tokenizer, parse_arguments(REQUIRED), VOCABULARY)
    assert len(findings.warnings) == 2
    assert all(warning in caplog.text for warning in findings.warnings)


def long_prompts(count: int = 20) -> list[dict]:
    """Rows of 40 tokens, the last two of which are the answer: 5 % of them."""
    return [row(40, 38, seed=number) for number in range(count)]


@pytest.mark.parametrize(
    ("words", "level", "beginning", "part"),
    [
        ("", "INFO", "5% of the tokens predict an answer's: --tokentune --prefix_length answers would", "0.37 of"),
        (
            "--tokentune --prefix_length 0.3",
            "INFO",
            "--prefix_length 0.3 selects 30% of the tokens, which predict all of the answers' tokens",
            "0.53 of the time and about 0.30 of the activations of ordinary training. --prefix_length answers: 5%",
        ),
        (
            "--tokentune --prefix_length answers --lora",
            "INFO",
            "--prefix_length answers selects 5% of the tokens, which predict all of the answers' tokens",
            "0.53 of the time and about 0.05 of",
        ),
        (
            "--tokentune --prefix_length 0.3 --selection random",
            "WARNING",
            "--prefix_length 0.3 selects 30% of the tokens, which predict ",
            "That is no more tokens and more of the answers",
        ),
        ("--tokentune --prefix_length 0.95", "WARNING", "--prefix_length 0.95 selects 95%", "saves hardly any time"),
    ],
)
def test_one_line_says_what_a_selection_holds_and_costs(
    words: str,
    level: str,
    beginning: str,
    part: str,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = InstructionData(Dataset.from_list(long_prompts()), None, None, None)
    arguments = parse_arguments([*REQUIRED, "--global_batch_size", "4", *words.split()])
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tokentune"):
        findings = check_data(data, tokenizer, arguments, VOCABULARY)
    (record,) = caplog.records
    assert record.levelname == level and record.message == findings.gain
    assert findings.gain.startswith(beginning) and part in findings.gain


def test_nothing_is_said_of_long_answers_and_of_scores(tokenizer: PreTrainedTokenizerBase) -> None:
    for rows, words in ((good(), ""), (long_prompts(), "--tokentune --prefix_length 0.3 --selection loss")):
        arguments = parse_arguments([*REQUIRED, "--global_batch_size", "4", *words.split()])
        data = InstructionData(Dataset.from_list(rows), None, None, None)
        assert look_at(data, tokenizer, arguments, VOCABULARY).gain is None


def test_of_a_stream_the_first_rows_are_looked_at(tokenizer: PreTrainedTokenizerBase) -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield row(end=None) | {"draw_seed": 5}

    words = ["--streaming", "--max_steps", "3", "--tokentune", "--prefix_length", "0.3"]
    data = InstructionData(Endless(), None, None, None)
    findings = look_at(data, tokenizer, parse_arguments([*REQUIRED, *words]), VOCABULARY)
    assert len(findings.train) == 1000
    assert findings.warnings[0].startswith("1,000 of the 1,000 training rows shorter than --max_length end without")
    assert findings.drawn[2].min() == findings.drawn[2].max() > 0  # one seed, one draw
    assert findings.gain.endswith("(counted in the first 1,000 rows)")
