"""Everything in README.md and docs/ that is generated: tables of results, flags of the commands, the tree of the code.

    python scripts/docs.py            # rewrites README.md and docs/*.md
    python scripts/docs.py --check    # says which of them are out of date (exit code 1)

Each generated part stands between `<!-- generated NAME -->` and `<!-- end -->`. Results come from
`scripts/bench/results/`, flags from the commands' own parsers, the tree from the first line of each file's docstring.
"""

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "figures"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import result_tables
from tables import markdown

from tokentune.cli import arguments, other_names, start
from tokentune.cli.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tokentune"
REQUIRED = " (required)"  # as the help says it
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    changed = {page: after for page, before in texts.items() if (after := filled(before)) != before}
    if check and changed:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(f"not up to date: {names}. Run python scripts/docs.py")
    for page, text in changed.items():
        page.write_text(text, encoding="utf-8")


def filled(text: str) -> str:
    """A page's text with every generated part made anew."""

    def part(match: re.Match) -> str:
        return f"<!-- generated {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- generated (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


# -------------------------------------------------------------------------------------------------------------- flags


def parser_of(command: str) -> Parser:
    """The parser whose help `python tokentune/COMMAND.py --help` prints."""
    return arguments.parser_of(start.COMMANDS[command])


def flags(command: str, beside: str | None = None) -> str:
    """A command's flags; with `beside`, only those that this other command lacks, or has with another meaning.

    Those that `--help` lists are bold, where it lists not all.
    """
    common = {f"`--{name}`" for name in parser_of(command).common}
    known = {tuple(row) for _, rows in flag_groups(beside) for row in rows} if beside else set()
    groups = [(title, [row for row in rows if tuple(row) not in known]) for title, rows in flag_groups(command)]
    groups = [(title, rows) for title, rows in groups if rows]
    shown = []
    for title, rows in groups:
        rows = [[f"**{name}**" if name in common else name, *rest] for name, *rest in rows]
        shown += [[f"**{title}**", "", ""], *rows] if len(groups) > 1 else rows
    return markdown(["flag", "default", "meaning"], shown)


def shared_flags(command: str, beside: str) -> str:
    """The names of the flags that two commands have in common."""
    first, second = ([row[0] for _, rows in flag_groups(name) for row in rows] for name in (command, beside))
    return ", ".join(name for name in first if name in second)


def flag_groups(command: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows of each group of flags; those that every command has (--help, --version, --config) come last."""
    groups = parser_of(command)._action_groups
    for group in sorted(groups, key=lambda group: group.title == "options"):
        actions = [action for action in group._group_actions if "--help" not in action.option_strings]
        if actions:
            yield "general" if group.title == "options" else group.title, [flag_row(action) for action in actions]


def flag_row(action: argparse.Action) -> list[str]:
    meaning = (action.help or "").removesuffix(REQUIRED)
    choices = [str(choice) for choice in action.choices or () if not isinstance(choice, bool)]
    if not all(re.search(rf"\b{re.escape(choice)}\b", meaning) for choice in choices):
        meaning += f"; one of {', '.join(choices)}"
    return [f"`{action.option_strings[-1]}`", default_of(action), meaning.replace("|", "\\|")]


def default_of(action: argparse.Action) -> str:
    default = action.default
    if (action.help or "").endswith(REQUIRED):
        return "required"
    if default is False:
        return "off"
    if default in (None, [], argparse.SUPPRESS):
        return "-"
    if isinstance(default, list):
        return " ".join(map(str, default))
    return Path(default).name if str(default).endswith(".json") else str(default)


def names_elsewhere() -> str:
    """What other tools call the flags of all commands, and what is said of names that mean something else."""
    understood = [
        [", ".join(f"`--{name}`" for name in names.split()), f"`--{flag}`{_where(flag)}"]
        for table in (other_names.SECOND, other_names.FORMER, other_names.SAME)
        for flag, names in table.items()
    ]
    answered = [
        [", ".join(f"`--{name}`" for name in names.split()), "; ".join(parts)] for names, *parts in other_names.ANSWERS
    ]
    return "\n\n".join((markdown(["read as", "flag"], understood), markdown(["not read", "instead"], answered)))


def _where(flag: str) -> str:
    """The commands that have a flag which `finetune.py` lacks."""
    having = [f"`{command}.py`" for command in start.COMMANDS if flag in parser_of(command).flags]
    return "" if "`finetune.py`" in having else f" of {', '.join(having)}"


# --------------------------------------------------------------------------------------------------------------- tree


def tree() -> str:
    """Every file of the package, with the first line of its docstring; a folder, with that of its `__init__.py`."""
    lines = [f"tokentune/  {first_line(PACKAGE / '__init__.py')}", *listing(PACKAGE, "  ")]
    return "\n".join(["```text", *lines, "```"])


def listing(folder: Path, indent: str) -> Iterator[str]:
    files = {path.name: first_line(path) for path in folder.glob("*.py") if path.name != "__init__.py"}
    width = max((len(name) for name in files), default=0)
    for name, line in sorted(files.items(), key=lambda item: (not item[1].startswith("Command:"), item[0])):
        yield f"{indent}{name:<{width}}  {line}"
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield f"{indent}{inner.name}/  {first_line(inner / '__init__.py')}"
        yield from listing(inner, indent + "  ")


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


PARTS: dict[str, Callable[[], str]] = {
    **result_tables.TABLES,
    "flags_finetune": lambda: flags("finetune"),
    "flags_classify": lambda: flags("classify", beside="finetune"),
    "flags_diagnose": lambda: flags("diagnose", beside="finetune"),
    "flags_diagnose_shared": lambda: shared_flags("diagnose", "finetune"),
    "flags_estimate": lambda: flags("estimate", beside="finetune"),
    "flags_merge": lambda: flags("merge"),
    "names_elsewhere": names_elsewhere,
    "flags_chat": lambda: flags("chat"),
    "tree": tree,
}

if __name__ == "__main__":
    main()
