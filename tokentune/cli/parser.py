"""Groups of typed flags as an argparse parser: one flag for each field. Imports nothing heavy, for a quick `--help`."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from tokentune.errors import UserError
from tokentune.settings.flags import REQUIRED, check_characters, default_of
from tokentune.version import __version__

UNBROKEN = "\0"  # a space in the help where no line may end
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_UNSET = object()


class Parser(argparse.ArgumentParser):
    """The flags of a command. Errors are `UserError`s in argparse's words."""

    def __init__(
        self, groups: Sequence[type], *, hidden: Sequence[str] = (), words: Sequence[str] = (), **settings: Any
    ) -> None:
        """`hidden`: titles of groups whose flags the help leaves out. `words`: flags whose values may stand by
        themselves, in this order."""
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **settings)
        self.needed: list[argparse.Action] = []
        self.words = words
        self.fixed: set[str] = set()  # flags of other commands, which have no meaning here: a file may give them
        for group in groups:
            title = group._argument_group_name
            section = self.add_argument_group(title, None if title in hidden else group.__doc__)
            kinds = get_type_hints(group)
            self.fixed |= {field.name for field in fields(group) if not field.init}
            for field in fields(group):
                if field.init:
                    self._add_flag(section, field, kinds[field.name], hidden=title in hidden)
        self.add_argument("--version", action="version", version=f"tokentune {__version__}", help="print the version")
        self.add_argument(
            "--config",
            metavar="FILE",
            action="append",
            help="YAML file of flags and their values (learning_rate: 4e-4), such as the run.yaml in a run's folder; "
            "flags given beside it override it (--bf16 false); paths in it are relative to the current folder",
        )
        flags = {action.dest: action for action in self._actions}
        alone = [flags[word].metavar if flags[word] in self.needed else f"[{flags[word].metavar}]" for word in words]
        needed = [f"{action.option_strings[0]} {action.metavar}" for action in self.needed if action.dest not in words]
        self.usage = " ".join([self.prog, *alone, *needed, "[flags]"])

    def _add_flag(self, section: Any, field: Field, kind: Any, *, hidden: bool) -> None:
        choices, options = (), {"help": field.metadata["help"], **field.metadata.get("options", {})}
        if get_origin(kind) in (Union, UnionType):
            (kind,) = (alternative for alternative in get_args(kind) if alternative is not NoneType)
        if get_origin(kind) is list:
            (kind,), options["nargs"] = get_args(kind), "+"
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        if choices and "metavar" not in options:
            options["metavar"] = f"{{{','.join(choices)}}}"
        if kind is bool:
            kind, options["nargs"], options["const"] = _boolean, "?", True
        options["default"] = default_of(field)
        names = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        action = section.add_argument(*names, type=kind, choices=choices or None, **options)
        action.metavar = action.metavar or _metavar(action)
        if action.default is REQUIRED:
            action.default = None
            self.needed.append(action)
            action.help += " (required)"
        if hidden:
            action.help = argparse.SUPPRESS

    @property
    def names(self) -> list[str]:
        """Every flag, in both spellings."""
        return [name for action in self._actions for name in action.option_strings]

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The flags that the words give, by name, with values of their types; no defaults.

        Raises:
            UserError: an unknown flag (with the nearest known one), a value of another type, a stray word.
            SystemExit: 0, after `--help` and `--version`.
        """
        for word in words:
            if not self.words:  # where a text may be given, which may have several lines
                check_characters(word, "the command line")
            self.check_name(word.split("=")[0])
        unset = argparse.Namespace(**{action.dest: _UNSET for action in self._actions})
        unset.config = None
        parsed, unknown = self.parse_known_args(words, unset)
        for name in self.words:
            if unknown and getattr(parsed, name) is _UNSET:
                setattr(parsed, name, unknown.pop(0))
        for word in unknown:
            hint = f": did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else " (--help lists all)"
            raise UserError(f"unexpected argument {word!r}, which belongs to no flag{hint}")
        return {name: value for name, value in vars(parsed).items() if value is not _UNSET and value is not None}

    def check_name(self, name: str) -> None:
        """Refuses a flag that there is not, before anything else: misspelt, a needed one would just be missing."""
        if name.startswith("--") and name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f": did you mean {near[0]}?" if near else " (--help lists all)"
            raise UserError(f"unknown argument {name}{hint}")

    def check_needed(self, given: dict[str, Any]) -> None:
        """Refuses, UserError, flags without those that are required."""
        if missing := [action for action in self.needed if action.dest not in given]:
            names = (action.metavar if action.dest in self.words else action.option_strings[0] for action in missing)
            self.error(f"the following arguments are required: {', '.join(names)}")

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first and bury the sentence, and repeats a value of any length.
        message = message if len(message) <= 500 else f"{message[:500]}..."
        raise UserError(f"{message} (--help lists all flags)")


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return BOOLEANS[text.lower()]


def _metavar(action: argparse.Action) -> str:
    """What stands for a flag's value in the help."""
    if action.type in (int, float):
        return {int: "N", float: "NUMBER"}[action.type]
    is_path = re.search("save_path|template|cache|snapshot|checkpoint|dir$", action.dest)
    return "PATH" if is_path else "NAME"


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)  # texts below their flags, all of the line's width

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Dashes within a name work too, and -h; said with every flag, they would double the text.
        flag = next(name for name in action.option_strings if name.startswith("--"))
        if action.nargs == 0 or action.type is _boolean:
            return flag
        return f"{flag} {self._format_args(action, action.dest.upper())}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = Path(shown).name if shown.startswith("/") else shown  # a file of this project
        return f"{action.help} (default:{UNBROKEN}{shown})"

    def _split_lines(self, text: str, width: int) -> Iterable[str]:
        # Not in the middle of a word with a hyphen: a flag or a name that is broken there cannot be copied.
        lines = textwrap.wrap(" ".join(text.split(" ")), width, break_on_hyphens=False, break_long_words=False)
        return [line.replace(UNBROKEN, " ") for line in lines]
