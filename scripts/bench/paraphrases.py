"""Paraphrase pairs for `classification.py`, made of the sentences of three GLUE tasks with light edits.

    python scripts/bench/paraphrases.py --data ../shared/data/glue --output ./paraphrases

Writes `paraphrase.{train,validation}.jsonl`: sentence1, sentence2, label (1: same meaning), half of each, the same rows
for the same seed. The sentences are RTE's, CoLA's acceptable ones and SST-2's, training pairs from the training files
and validation pairs from the validation files. A paraphrase differs by one to three light edits: a synonym from a short
list, a dropped filler word, a contraction, two joined words exchanged, a closing phrase put first. The others go
through such edits too, and besides have another number, one negation more or less, an opposite word or two names
exchanged (`EDITED_NEGATIVES` of them), or are the most similar other sentence of their file. Which of the two sentences
comes first is drawn. The labels are the edits', nobody has read the pairs: a few are wrong.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROWS = {"train": 2000, "validation": 400}
SHARES = {"rte": 0.5, "cola": 0.25, "sst2": 0.25}
EDITED_NEGATIVES = 0.7  # of the pairs with different meaning; the others are similar sentences
MOST_SIMILAR = 0.6  # of all words of both shared: above it, another sentence may well say the same
WORDS = range(7, 41)  # of a sentence
Edit = Callable[[list[str], random.Random], list[str] | None]  # a sentence's words -> edited, None: does not apply


def words_in(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYNONYMS = (
    "begin/start begins/starts began/started buy/purchase bought/purchased big/large small/little kill/slay "
    "film/movie films/movies funny/amusing smart/clever quick/fast quickly/rapidly happy/glad sad/unhappy "
    "help/assist helped/assisted say/state said/stated says/states show/display shows/displays showed/displayed "
    "child/kid children/kids car/automobile cars/automobiles maybe/perhaps answer/reply answered/replied "
    "firm/company firms/companies nation/country nations/countries reporters/journalists people/persons "
    "picture/image pictures/images several/various many/numerous often/frequently usually/normally almost/nearly "
    "about/regarding although/though however/nevertheless because/since attack/assault attacks/assaults "
    "end/finish ended/finished get/obtain got/obtained find/discover found/discovered make/produce "
    "makes/produces whole/entire hard/difficult easy/simple boring/dull terrible/horrible lovely/charming "
    "story/tale stories/tales talk/speak talked/spoke think/believe thinks/believes thought/believed "
    "want/wish wants/wishes wanted/wished tell/inform told/informed near/close law/legislation "
    "increase/rise decrease/decline injured/hurt murdered/killed officials/authorities leader/head "
    "important/significant major/main yearly/annual main/principal hopes/expects build/construct built/constructed"
)
OPPOSITES = (
    "good/bad best/worst better/worse more/less most/least always/never before/after above/below high/low "
    "higher/lower old/new young/old early/late long/short big/tiny large/small happy/sad win/lose won/lost "
    "open/closed opened/closed first/last many/few everyone/nobody everything/nothing all/none both/neither "
    "love/hate loves/hates loved/hated rise/fall rose/fell increase/decrease increased/decreased strong/weak "
    "accepted/rejected accept/reject begin/end began/ended north/south east/west buy/sell bought/sold "
    "with/without inside/outside up/down left/right alive/dead true/false funny/boring great/awful "
    "interesting/dull entertaining/tedious remember/forget push/pull full/empty rich/poor men/women man/woman "
    "he/she his/her father/mother brother/sister boy/girl king/queen arrived/left"
)
FILLERS = words_in("very really quite just also rather actually simply truly indeed certainly still already")
CONTRACTIONS = (
    ("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"), ("is not", "isn't"), ("are not", "aren't"),
    ("was not", "wasn't"), ("were not", "weren't"), ("cannot", "can't"), ("will not", "won't"),
    ("would not", "wouldn't"), ("could not", "couldn't"), ("has not", "hasn't"), ("have not", "haven't"),
    ("had not", "hadn't"), ("do n't", "don't"), ("does n't", "doesn't"), ("is n't", "isn't"), ("ca n't", "can't"),
    ("it is", "it's"), ("that is", "that's"), ("i am", "i'm"), ("we are", "we're"),
)  # fmt: skip
AUXILIARIES = words_in("is are was were can could will would should must may might has have had does did")
NUMBERS = words_in("two three four five six seven eight nine ten twelve twenty hundred thousand million billion")
PHRASE_STARTS = words_in("in on at during after before since until yesterday today under near")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with {rte,cola,sst2}.{train,validation}.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for split, rows in ROWS.items():
        pairs = paraphrases(options.data, split, rows, options.seed)
        path = write_pairs(pairs, options.output / f"paraphrase.{split}.jsonl")
        print(f"written: {path}: {len(pairs)} pairs, {dict(Counter(pair['made_by'] for pair in pairs))}")


def paraphrases(glue: Path, split: str, count: int, seed: int) -> list[dict]:
    """`count` pairs {sentence1, sentence2, label, made_by}, half of them of the same meaning, in a drawn order."""
    draw = random.Random(f"{seed} {split}")
    pairs = []
    for task, share in SHARES.items():
        sentences = list(dict.fromkeys(read_sentences(glue, task, split)))
        draw.shuffle(sentences)
        half = round(count * share / 2)
        made = {1: [], 0: []}
        for sentence in sentences:
            label = int(len(made[1]) <= len(made[0]))
            if len(made[label]) < half:
                pair = make_pair(sentence, label, sentences, draw)
                made[label] += [pair] if pair else []
        if min(map(len, made.values())) < half:
            raise SystemExit(f"{task}.{split}.jsonl has too few sentences for {half} pairs of each kind")
        pairs += made[0] + made[1]
    draw.shuffle(pairs)
    return pairs


def read_sentences(glue: Path, task: str, split: str) -> Iterator[str]:
    for line in (glue / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if task == "cola" and row["label"] != 1:
            continue
        for name in ("sentence", "sentence1", "sentence2"):
            if len(row.get(name, "").split()) in WORDS:
                yield row[name].strip()


def make_pair(sentence: str, label: int, others: list[str], draw: random.Random) -> dict | None:
    """A pair around `sentence`, or None where no edit fits it."""
    words = sentence.split()
    if label:
        other = lightly_edited(words, draw.randint(1, 3), draw)
        made_by = "light edits"
    elif draw.random() < EDITED_NEGATIVES:
        changed = changed_meaning(words, draw)
        if changed is None:
            return None
        made_by, other = changed[0], lightly_edited(changed[1], draw.randint(0, 2), draw)
    else:
        other, made_by = most_similar(words, others), "similar sentence"
    if other is None or " ".join(other).lower() == sentence.lower():
        return None
    pair = [sentence, " ".join(other)]
    draw.shuffle(pair)
    return {"sentence1": pair[0], "sentence2": pair[1], "label": label, "made_by": made_by}


def lightly_edited(words: list[str], count: int, draw: random.Random) -> list[str] | None:
    """Up to `count` different edits that keep the meaning; None where not even one of a wanted one applies."""
    edits = [synonym, drop_filler, contraction, exchange_joined, front_phrase]
    draw.shuffle(edits)
    done = 0
    for edit in edits:
        edited = edit(words, draw) if done < count else None
        if edited is not None:
            words, done = edited, done + 1
    return words if done or not count else None


def changed_meaning(words: list[str], draw: random.Random) -> tuple[str, list[str]] | None:
    """(name of the edit, words) of a drawn edit that changes what is said."""
    edits = [("number", other_number), ("negation", negation), ("opposite", opposite), ("names", exchange_names)]
    draw.shuffle(edits)
    for name, edit in edits:
        edited = edit(words, draw)
        if edited is not None:
            return name, edited
    return None


def most_similar(words: list[str], others: list[str]) -> list[str] | None:
    """The sentence that shares most words with this one, short of being nearly the same."""
    own = bag(words)
    best, at = 0.0, None
    for other in others:
        theirs = bag(other.split())
        overlap = len(own & theirs) / len(own | theirs)
        if best < overlap < MOST_SIMILAR:
            best, at = overlap, other
    return at.split() if at else None


def bag(words: list[str]) -> set[str]:
    return {re.sub(r"\W", "", word.lower()) for word in words} - {""}


def table_of(pairs: str) -> dict[str, list[str]]:
    table = {}
    for pair in pairs.split():
        one, other = pair.split("/")
        table.setdefault(one, []).append(other)
        table.setdefault(other, []).append(one)
    return table


def replaced(words: list[str], table: dict[str, list[str]], draw: random.Random) -> list[str] | None:
    """One drawn word that the table knows, by one of its entries; capitals and punctuation are kept."""
    places = [at for at, word in enumerate(words) if core(word).lower() in table]
    if not places:
        return None
    at = draw.choice(places)
    new = draw.choice(table[core(words[at]).lower()])
    return [*words[:at], with_core(words[at], new), *words[at + 1 :]]


def core(word: str) -> str:
    return word.strip(".,;:!?\"'()")


def with_core(word: str, new: str) -> str:
    """`word` with other letters between its punctuation, with a capital where it had one."""
    old = core(word)
    return word.replace(old, new.capitalize() if old[:1].isupper() else new)


def synonym(words: list[str], draw: random.Random) -> list[str] | None:
    return replaced(words, table_of(SYNONYMS), draw)


def drop_filler(words: list[str], draw: random.Random) -> list[str] | None:
    places = [at for at, word in enumerate(words) if word.lower() in FILLERS]
    if not places:
        return None
    at = draw.choice(places)
    return words[:at] + words[at + 1 :]


def contraction(words: list[str], draw: random.Random) -> list[str] | None:
    """ "do not" <-> "don't"; a spelling that reads "do n't" is only ever made whole."""
    text = " ".join(words)
    pairs = CONTRACTIONS + tuple((new, old) for old, new in CONTRACTIONS if " n't" not in old)
    for old, new in draw.sample(pairs, len(pairs)):
        match = re.search(rf"(?<!\S){re.escape(old)}(?=\W|$)", text, flags=re.IGNORECASE)
        if match:
            new = new.capitalize() if match[0][0].isupper() else new
            return (text[: match.start()] + new + text[match.end() :]).split()
    return None


def exchange_joined(words: list[str], draw: random.Random) -> list[str] | None:
    """ "A and B" -> "B and A", for single words without punctuation."""
    places = [
        at
        for at in range(1, len(words) - 1)
        if words[at].lower() in ("and", "or")
        and at > 1
        and all(word.isalpha() and word.lower() not in AUXILIARIES for word in (words[at - 1], words[at + 1]))
    ]
    if not places:
        return None
    at = draw.choice(places)
    return [*words[: at - 1], words[at + 1], words[at], words[at - 1], *words[at + 2 :]]


def front_phrase(words: list[str], draw: random.Random) -> list[str] | None:
    """ "She left in the morning." -> "In the morning, she left."."""
    end = words[-1][-1] if words[-1][-1] in ".!?" else ""
    closed = [*words[:-1], words[-1].rstrip(".!?")]
    if not closed[-1]:
        closed = closed[:-1]
    for at in range(len(closed) - 2, max(len(closed) - 7, 3), -1):
        if closed[at].lower() in PHRASE_STARTS and not any("," in word for word in closed[at:]):
            front, rest = closed[at:], closed[:at]
            name = rest[0][1:2].isupper() or rest[0] == "I" or rest[0] in closed[1:]
            start = rest[0] if name else rest[0].lower()
            capital = front[0].capitalize() if closed[0][:1].isupper() else front[0]
            return [capital, *front[1:-1], front[-1] + ",", start, *rest[1:-1], rest[-1] + end]
    return None


def other_number(words: list[str], draw: random.Random) -> list[str] | None:
    places = [at for at, word in enumerate(words) if re.search(r"\d", word) or core(word).lower() in NUMBERS]
    if not places:
        return None
    at = draw.choice(places)
    if core(words[at]).lower() in NUMBERS:
        new = draw.choice([number for number in NUMBERS if number != core(words[at]).lower()])
        return [*words[:at], with_core(words[at], new), *words[at + 1 :]]
    digits = [place for place, letter in enumerate(words[at]) if letter.isdigit()]
    place = draw.choice(digits)
    digit = draw.choice([digit for digit in "123456789" if digit != words[at][place]])
    return [*words[:at], words[at][:place] + digit + words[at][place + 1 :], *words[at + 1 :]]


def negation(words: list[str], draw: random.Random) -> list[str] | None:
    """One "not" or "never" less, or one more after an auxiliary verb."""
    for at, word in enumerate(words):
        if core(word).lower() in ("not", "n't", "never"):
            return words[:at] + words[at + 1 :]
        if word.lower().endswith("n't") and word.lower()[:-3] in (*AUXILIARIES, "do"):
            return [*words[:at], word[:-3], *words[at + 1 :]]
    places = [at for at, word in enumerate(words[:-1]) if word.lower() in AUXILIARIES]
    if not places:
        return None
    at = draw.choice(places) + 1
    return [*words[:at], "not", *words[at:]]


def opposite(words: list[str], draw: random.Random) -> list[str] | None:
    return replaced(words, table_of(OPPOSITES), draw)


def exchange_names(words: list[str], draw: random.Random) -> list[str] | None:
    """ "John saw Mary" -> "Mary saw John"; not around "and", where it would change nothing."""
    names = [at for at, word in enumerate(words) if re.fullmatch(r"[A-Z][a-z]+", core(word)) and at > 0]
    pairs = [(one, other) for one in names for other in names if other - one >= 2 and words[one] != words[other]]
    pairs = [(one, other) for one, other in pairs if not {"and", "or"} & set(words[one:other])]
    if not pairs:
        return None
    one, other = draw.choice(pairs)
    edited = list(words)
    edited[one], edited[other] = with_core(words[one], core(words[other])), with_core(words[other], core(words[one]))
    return edited


def write_pairs(pairs: list[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: pair[name] for name in ("sentence1", "sentence2", "label")} for pair in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
