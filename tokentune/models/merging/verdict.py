"""What the differences that a merge measures mean: one sentence each, with what to do."""

from typing import Any, Literal, NamedTuple

from tokentune.models.merging.logit_difference import LogitDifference

# Rounding the merged weights to 16 bits adds noise to the logits, which is judged by what the adapter does to them. The
# squares add up: at a tenth the noise is a hundredth of the adapter's effect, at a half it is a quarter of it. Measured
# on a Llama of 6 layers, in % of the logits' standard deviation (root mean square): bfloat16 0.11 to 0.26, float16 0.02
# to 0.04, for adapters that do 0.6 to 66; with bfloat16 arithmetic 0.7 to 1.0, at a single logit up to 8.
FINE, LARGEST = 0.1, 0.5


class Verdict(NamedTuple):
    """Of a merged model."""

    kind: Literal["fine", "noticeable", "too large"]
    sentence: str


def verdict_of(dtype: str, exact: LogitDifference, effect: LogitDifference) -> Verdict:
    """Of a merged model that was read back.

    Args:
        dtype: of its weights, "bfloat16".
        exact: from base + adapter to it, both computed in float32: what rounding its weights does.
        effect: from base + adapter to the base, computed in float32: what the adapter does.
    """
    share = exact.rms / effect.rms if effect.rms > 0 else float(exact.rms > 0)
    moved = (
        f"rounding the merged weights to {dtype} moves the logits by {100 * share:.2g} % of what the adapter does "
        "(root mean square)"
    )
    if dtype == "float32":
        return Verdict("fine", f"fine: {moved}.")
    if share <= FINE:
        return Verdict("fine", f"fine: {moved}. The rest of the difference is {dtype} arithmetic, in any such model.")
    cure = "--dtype float32 does not round" + (", float16 rounds to an eighth of it." if dtype == "bfloat16" else ".")
    if share <= LARGEST:
        return Verdict("noticeable", f"noticeable: {moved}. {cure}")
    return Verdict("too large", f"too large: {moved}, and hides what was learnt. {cure}")


def qlora_verdict(qlora: dict[str, Any], flag: str) -> str:
    """Which of its two bases a QLoRA adapter was merged into, why, and how to get the other.

    Args:
        qlora: of `merge_summary.json`.
        flag: the one that chooses the base.
    """
    measured = qlora["from_training"]
    saved = qlora["base"]
    (other,) = measured.keys() - {saved}
    away = {kind: f"{100 * difference['relative_rms']:.2g} % away" for kind, difference in measured.items()}
    base = {
        "16bit": "the base's own weights, which have no rounding to 4 bits, but which the adapter was not trained on",
        "dequantized": "the 4-bit weights that the adapter was trained on, as 16-bit numbers",
    }
    default = " (the default)" if saved == "16bit" else ""
    said = f"merged by {flag} {saved}{default} into {base[saved]}: {away[saved]} from what was trained. "
    said += f"{flag} {other} takes {base[other]}: {away[other]}."
    if measured[other]["rms"] < measured[saved]["rms"]:
        said += f" {flag} {other} is closer to what was trained than what was saved: compare both on validation data."
    return said
