"""Makes the quick start's instruction set: questions for training, and held-out questions for the evaluation.

    python scripts/quickstart/make_data.py --output_dir quickstart/data

Writes `train.jsonl` (all skills, shuffled; Alpaca's columns) and `held_out/<skill>.jsonl`. No subject of a held-out
question (`skills.py`: a country, a pair of numbers, a set of words) occurs in training, in whatever words or order.
"""

import argparse
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from skills import SKILLS, Question, World, make_world

TRAINING_QUESTIONS = 2500  # of each skill, with repetitions where a skill has fewer
HELD_OUT_QUESTIONS = 60
HELD_OUT_SHARE = 0.3  # of the subjects, where they are a short list


def skill_questions(name: str, world: World, seed: int) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions of one skill; the held-out ones are all different."""
    skill = SKILLS[name]
    rng = random.Random(f"questions {seed} {name}")
    subjects = skill.subjects(world) if skill.subjects else []
    random.Random(f"subjects {seed}").shuffle(subjects)  # skills that ask about the same ones hold the same ones out
    cut = round(HELD_OUT_SHARE * len(subjects))

    held_out: dict[tuple[str, str], Question] = {}
    while len(held_out) < HELD_OUT_QUESTIONS:
        question = skill.question(rng, world, rng.choice(subjects[:cut]) if subjects else None)
        held_out[question.instruction, question.input] = question
    taken = {question.subject for question in held_out.values()} | set(subjects[:cut])

    training: list[Question] = []
    while len(training) < TRAINING_QUESTIONS:
        question = skill.question(rng, world, rng.choice(subjects[cut:]) if subjects else None)
        if question.subject not in taken:
            training.append(question)
    return training, list(held_out.values())


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({key: value for key, value in asdict(q).items() if key != "subject"} for q in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    world = make_world(arguments.seed)
    training: list[Question] = []
    for name in SKILLS:
        questions, held_out = skill_questions(name, world, arguments.seed)
        training += questions
        write_questions(arguments.output_dir / "held_out" / f"{name}.jsonl", held_out)
    random.Random(f"order {arguments.seed}").shuffle(training)
    write_questions(arguments.output_dir / "train.jsonl", training)
    print(
        f"{len(training):,} questions of {len(SKILLS)} skills to train on, {HELD_OUT_QUESTIONS} held out of each"
        f" in {arguments.output_dir}"
    )


if __name__ == "__main__":
    main()
