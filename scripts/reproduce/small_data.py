"""Data for the small run: a few training and validation rows, and questions for lm-eval made from other rows.

    python scripts/reproduce/small_data.py --train rows.jsonl --validation other_rows.jsonl --output_dir data

Writes `train.jsonl`, `validation.jsonl`, and `questions.jsonl`, one question per line: the training prompt, four
answers cut to their first words (three of them belong to other questions), and the right one's number.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate
from tokentune.errors import UserError

CHOICES, WORDS = 4, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="instruction rows, JSON Lines")
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train_rows", type=int, default=128)
    parser.add_argument("--validation_rows", type=int, default=32)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        training = read_rows(options.train, options.train_rows)
        held_out = read_rows(options.validation, options.validation_rows + options.questions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    questions = make_questions(held_out[options.validation_rows :], random.Random(options.seed))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write(options.output_dir / "train.jsonl", training)
    write(options.output_dir / "validation.jsonl", held_out[: options.validation_rows])
    write(options.output_dir / "questions.jsonl", questions)


def read_rows(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows.

    Raises:
        UserError: there are not so many, or no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    if len(lines) < count:
        raise UserError(f"{path}: has {len(lines)} rows, {count} are needed")
    return [json.loads(line) for line in lines]


def make_questions(rows: list[dict[str, str]], rng: random.Random) -> list[dict]:
    template = PromptTemplate.load(DEFAULT_TEMPLATE)
    answers = [" ".join(row["output"].split()[:WORDS]) for row in rows]
    questions = []
    for row, answer in zip(rows, answers, strict=True):
        choices = [answer, *rng.sample([other for other in answers if other != answer], CHOICES - 1)]
        rng.shuffle(choices)
        prompt = template.prompt(row["instruction"], row.get("input", ""))
        questions.append({"prompt": prompt, "choices": choices, "answer": choices.index(answer)})
    return questions


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
