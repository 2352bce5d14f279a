"""The built-in strategies of `--selection`: in words, and what they need. Imports nothing, for a quick `--help`."""

UNSCORED = {
    "random": "uniformly without replacement, the paper's way",
    "reference": "as the authors' released code did: the first and the last token, never the last but one",
    "supervised": "tokens with a loss first, of these words inside of entities, then others at random",
    "stratified": "evenly over the sequence: one token of each of as many parts as there are to be tokens",
    "contiguous": "a random window, of those that hold a token with a loss where there is one",
}
# By scores of a pass over all tokens that comes first.
SCORED = {
    "loss": "the token's loss",
    "excess_loss": "its excess over that of --selection_reference_model",
    "gradient": "the norm of the gradient at its output",
    "attention": "the attention that it receives",
    "tokenseek": "the last two, blended as TokenSeek does",
}
# The scores of each.
NEEDS = dict.fromkeys(UNSCORED, ()) | {name: (name,) for name in SCORED} | {"tokenseek": ("attention", "gradient")}


def in_words(meanings: dict[str, str]) -> str:
    """For a flag's help: each name, and in brackets what it does."""
    return ", ".join(f"{name} ({meaning})" for name, meaning in meanings.items())
