"""The small generated world of the quick start: its facts, its six skills, and text about them.

Look at it: `python scripts/quickstart/skills.py` prints some of the base's text, and one question of each skill.

The base model reads plain notes about this world (`note`); the instruction set asks about it (`question`), in other
words than the notes. So the base holds the knowledge, and cannot answer an instruction: fine-tuning teaches it that.
Everything is drawn from one seed: no text and no weights come from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

CATEGORIES = {
    "animal": ["horse", "goat", "lion", "tiger", "rabbit", "camel"],
    "fruit": ["apple", "pear", "plum", "lemon", "orange", "banana"],
    "tool": ["hammer", "saw", "drill", "wrench", "chisel", "shovel", "rake", "axe"],
    "place": ["castle", "harbor", "garden", "bridge", "forest", "island"],
}
WORDS = [word for words in CATEGORIES.values() for word in words]
SYLLABLES = [
    *("ba", "be", "do", "fa", "ga", "ki", "la", "lo", "ma", "mi", "na", "no", "pe"),
    *("ra", "ri", "sa", "si", "ta", "tu", "va", "ve", "vi", "zo", "zu"),
]

COUNTRIES = 80
LARGEST_TERM = 12  # sums of two numbers from 1 to this
LARGEST_NUMBER = 30  # numbers to put in order
LIST_LENGTH = 3  # words or numbers in a list
PAGE = 6  # facts on a page

# What stands between a heading and its result. The variety keeps the base from learning one rigid layout: what it
# knows can then be reached from a layout that it has never seen, the prompt's.
GAPS = (":\n", "\n", "\n\n")


@dataclass(frozen=True)
class World:
    """capitals: country -> capital. All names are made up, and no two are the same."""

    capitals: dict[str, str]


@dataclass(frozen=True)
class Question:
    """One question in Alpaca's columns. Questions with the same `subject` have the same answer for the same reason,
    so they all go to training, or all to the held-out files."""

    instruction: str
    input: str
    output: str
    subject: str


@dataclass(frozen=True)
class Skill:
    """note: a piece of plain text for the base. question: one on the given subject, or on a new one.

    subjects: all that can be asked about, where that is a short list (None: drawn anew each time)."""

    note: Callable[[random.Random, World], str]
    question: Callable[[random.Random, World, str | None], Question]
    subjects: Callable[[World], list[str]] | None = None


def make_world(seed: int) -> World:
    rng = random.Random(f"world {seed}")
    names: set[str] = set()

    def new_name(syllables: int, ending: str) -> str:
        while True:
            name = "".join(rng.choices(SYLLABLES, k=syllables)).capitalize() + ending
            if name not in names:
                names.add(name)
                return name

    return World({new_name(3, ""): new_name(2, "polis") for _ in range(COUNTRIES)})


def random_note(rng: random.Random, world: World) -> str:
    """A note on any of the skills. Facts and sums come more often: they are learnt by heart, one by one."""
    weights = {"capital": 4, "sum": 4, "words": 3, "find": 3, "numbers": 3}
    return SKILLS[rng.choices(list(weights), list(weights.values()))[0]].note(rng, world)


def under_heading(rng: random.Random, heading: str, result: str) -> str:
    return heading + rng.choice(GAPS) + result


def list_note(rng: random.Random, operation: str, items: list[str], result: str) -> str:
    """What is done with a list, the list, and the result."""
    return under_heading(rng, operation + rng.choice((" ", "\n", ":\n")) + " ".join(items), result)


def order_note(rng: random.Random, order: str, items: list[str], key: Callable[[str], int | str]) -> str:
    """A list in order, or in the opposite order: a base that knew one order only would put any list in that order."""
    if rng.random() < 0.25:
        return list_note(rng, f"opposite of {order} order", items, " ".join(sorted(items, key=key, reverse=True)))
    return list_note(rng, f"in {order} order", items, " ".join(sorted(items, key=key)))


def shuffle_out_of_order(rng: random.Random, items: list[str], key: Callable[[str], int | str]) -> None:
    """Shuffles in place, never into order: repeating the list is no right answer."""
    while items == sorted(items, key=key):
        rng.shuffle(items)


# --- capital: recall of a fact that the base has read. The countries asked about in the end are not asked in training.


def capital_note(rng: random.Random, world: World) -> str:
    country, capital = rng.choice(list(world.capitals.items()))
    if rng.random() < 0.3:
        return f"{capital} is the capital of {country}."
    return under_heading(rng, f"capital of {country}", capital)


def capital_question(rng: random.Random, world: World, country: str | None) -> Question:
    country = country or rng.choice(list(world.capitals))
    wording = rng.choice(["What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"])
    return Question(wording.format(country), "", world.capitals[country], country)


# --- sum: the base has read the table of all sums. The pairs asked about in the end are not asked in training.


def sum_note(rng: random.Random, world: World) -> str:
    a, b = rng.randint(1, LARGEST_TERM), rng.randint(1, LARGEST_TERM)
    return under_heading(rng, f"value of {a} plus {b}", str(a + b))


def sum_subjects(world: World) -> list[str]:
    return [f"{a} {b}" for a in range(1, LARGEST_TERM + 1) for b in range(a, LARGEST_TERM + 1)]


def sum_question(rng: random.Random, world: World, pair: str | None) -> Question:
    pair = pair or rng.choice(sum_subjects(world))
    a, b = rng.sample(pair.split(), 2)  # in either order: both are the same pair
    wording = rng.choice(["What is {} plus {}?", "Calculate {} plus {}."])
    return Question(wording.format(a, b), "", str(int(a) + int(b)), pair)


# --- words: in alphabetical order.


def words_note(rng: random.Random, world: World) -> str:
    return order_note(rng, "alphabetical", rng.sample(WORDS, LIST_LENGTH), str)


def words_question(rng: random.Random, world: World, subject: str | None) -> Question:
    words = sorted(subject.split() if subject else rng.sample(WORDS, LIST_LENGTH))
    shuffle_out_of_order(rng, words, str)
    wording = rng.choice(["Sort the words from A to Z.", "Write the words in the order of the alphabet."])
    answer = " ".join(sorted(words))
    return Question(wording, " ".join(words), answer, answer)


# --- find: the one word of a list that belongs to a category.


def find_note(rng: random.Random, world: World) -> str:
    categories = rng.sample(list(CATEGORIES), LIST_LENGTH)
    words = [rng.choice(CATEGORIES[category]) for category in categories]
    index = rng.randrange(LIST_LENGTH)
    if rng.random() < 0.2:
        return f"The {words[index]} is a kind of {categories[index]}."
    return list_note(rng, f"the only {categories[index]}", words, words[index])


def find_question(rng: random.Random, world: World, subject: str | None) -> Question:
    if subject:
        category, *words = subject.split()
    else:
        categories = rng.sample(list(CATEGORIES), LIST_LENGTH)
        category, words = categories[0], sorted(rng.choice(CATEGORIES[name]) for name in categories)
        subject = " ".join([category, *words])
    rng.shuffle(words)
    wording = rng.choice(["Find the {} in the list.", "Which of the words names the {}?"])
    found = next(word for word in words if word in CATEGORIES[category])
    return Question(wording.format(category), " ".join(words), found, subject)


# --- numbers: from small to large.


def numbers_note(rng: random.Random, world: World) -> str:
    return order_note(rng, "ascending", [str(n) for n in rng.sample(range(1, LARGEST_NUMBER + 1), LIST_LENGTH)], int)


def numbers_question(rng: random.Random, world: World, subject: str | None) -> Question:
    numbers = subject.split() if subject else [str(n) for n in rng.sample(range(1, LARGEST_NUMBER + 1), LIST_LENGTH)]
    numbers.sort(key=int)
    shuffle_out_of_order(rng, numbers, int)
    wording = rng.choice(["Sort the numbers from small to large.", "Write the numbers in the order of their size."])
    answer = " ".join(sorted(numbers, key=int))
    return Question(wording, " ".join(numbers), answer, answer)


# --- page: a sum again, below a page that does not matter. The prompt is seventy times as long as the answer.


def page_question(rng: random.Random, world: World, pair: str | None) -> Question:
    question, countries = sum_question(rng, world, pair), rng.sample([*world.capitals], PAGE)
    page = " ".join(f"{world.capitals[country]} is the capital of {country}." for country in countries)
    return replace(question, instruction=f"{page} {question.instruction}")


SKILLS: dict[str, Skill] = {
    "capital": Skill(capital_note, capital_question, lambda world: list(world.capitals)),
    "sum": Skill(sum_note, sum_question, sum_subjects),
    "words": Skill(words_note, words_question),
    "find": Skill(find_note, find_question),
    "numbers": Skill(numbers_note, numbers_question),
    "page": Skill(sum_note, page_question, sum_subjects),
}


def main() -> None:
    rng, world = random.Random(0), make_world(0)
    print("The base model reads:\n" + "\n".join(random_note(rng, world) for _ in range(8)))
    print("\nThe instruction set asks:")
    for name, skill in SKILLS.items():
        question = skill.question(rng, world, None)
        print(f"  {name:8} {question.instruction} {question.input} -> {question.output}")


if __name__ == "__main__":
    main()
