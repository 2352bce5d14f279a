"""The README's tables, made from committed results and from the code.

    python scripts/figures/readme_tables.py            # rewrites README.md
    python scripts/figures/readme_tables.py --check    # says whether it is up to date (exit code 1: it is not)

Each table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokentune.arguments import Arguments
from tokentune.memory import BYTES_IN_MIB

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results"
METHOD_NAMES = {
    "full": "plain training",
    "checkpointing": "plain, gradient checkpointing",
    "tokentune": "**TokenTune, 30 % of the tokens**",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before)
    if check and before != after:
        sys.exit("README.md is not up to date: run python scripts/figures/readme_tables.py")
    if not check:
        readme.write_text(after, encoding="utf-8")


def filled(text: str) -> str:
    """The README's text with every table made anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def step_table() -> str:
    rows = []
    for row in read("step_cpu.json")["rows"]:
        if row["key_value_heads"] != 4:
            continue
        low, middle, high = row["time_ratio_to_full"]
        weights = {"full": "all weights", "lora": "LoRA"}[row["train"]]
        of_time = "1" if row["method"] == "full" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append(
            [
                weights,
                METHOD_NAMES[row["method"]],
                f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB",
                f"{row['bytes_ratio_to_full']:.2f}",
                f"{statistics.median(row['seconds']):.2f} s",
                of_time,
            ]
        )
    return markdown(["trained", "method", "kept for backward", "of plain", "step", "of plain (95 % interval)"], rows)


def instruction_tuning_table() -> str:
    report = read("instruction_tuning.json")
    rows = [["base", f"{report['rows'][0]['base_loss']:.3f}", "", ""]]
    for row in report["rows"]:
        saved = f"{row['saved_for_backward_bytes'] / BYTES_IN_MIB:.0f} MiB"
        rows.append([row["run"], f"{row['final_loss']:.3f}", saved, f"{row['tokens_per_second']:.0f}"])
    merge = report["merge"]
    gap = abs(merge["merged, float32"] - merge["base + adapter, float32"])
    rows.append([f"... merged ({gap:.0e} from base + adapter)", f"{merge['merged, float32']:.3f}", "", ""])
    return markdown(["", "validation loss", "kept for backward", "tokens/s (CPU)"], rows)


def quickstart_table() -> str:
    """From a copy of the quick start's own report.json."""
    match = read("quickstart.json")["exact_match"]
    rows = [[skill, f"{share:.0%}", f"{match['merged'][skill]:.0%}"] for skill, share in match["base"].items()]
    return markdown(["skill", "exact match before", "after"], rows)


def families_table() -> str:
    """The families that are served, and below them those that are refused, with the reason."""
    served, refused = [], []
    for row in read("families.json")["rows"]:
        name = row["family"] + (" *" if row["drawn"] else "")
        if "refused" in row:
            refused.append([name, f"`{row['class']}`", row["refused"]])
        else:
            figures = [row["attention"], f"{row['difference']:.0e}", f"{row['bytes_ratio']:.2f}"]
            served.append([name, f"`{row['class']}`", *figures])
    header = ["served", "class", "attention", "largest difference", "kept for backward, of plain"]
    return f"{markdown(header, served)}\n\n{markdown(['refused', 'class', 'reason'], refused)}"


def flags_table() -> str:
    rows = []
    for group in dataclasses.fields(Arguments):
        rows.append([f"**{group.type._argument_group_name}**", "", ""])
        for flag in dataclasses.fields(group.type):
            rows.append([f"`--{flag.name}`", default_of(flag), flag.metadata["help"].replace("|", "\\|")])
    return markdown(["flag", "default", "meaning"], rows)


def default_of(flag: dataclasses.Field) -> str:
    if flag.default_factory is not dataclasses.MISSING:
        return " ".join(flag.default_factory())
    if flag.default is dataclasses.MISSING:
        return "required"
    if isinstance(flag.default, bool) or flag.default is None:
        return "off" if flag.default is False else "-"
    return Path(flag.default).name if str(flag.default).endswith(".json") else str(flag.default)


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table,
    "instruction_tuning": instruction_tuning_table,
    "quickstart": quickstart_table,
    "families": families_table,
    "flags": flags_table,
}

if __name__ == "__main__":
    main()
