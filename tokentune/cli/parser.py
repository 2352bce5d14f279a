"""Groups of typed flags as an argparse parser: one flag for each field. Imports nothing heavy, for a quick `--help`."""

import argparse
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from tokentune.cli.other_names import note, synonyms, what_instead
from tokentune.errors import UserError
from tokentune.settings.flags import AUTO, REQUIRED, check_characters, default_of, require
from tokentune.version import __version__

UNBROKEN = "\0"  # a space in the help where no line may end
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
ALL_LISTED = "--help all lists all flags"
_UNSET = object()


class Parser(argparse.ArgumentParser):
    """The flags of a command. Errors are `UserError`s in argparse's words."""

    def __init__(
        self, groups: Sequence[type], *, common: Collection[str] = (), words: Sequence[str] = (), **settings: Any
    ) -> None:
        """
        Args:
            common: what `--help` lists, flags and titles of groups; `--help all` lists all, and so does no entry.
            words: flags whose values may stand by themselves, in this order.
        """
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_HelpFormatter, **settings)
        self.needed: list[argparse.Action] = []
        self.words = words
        self.fixed: set[str] = set()  # flags of other commands, which have no meaning here: a file may give them
        self.common = set(common)
        self.notes: list[str] = []  # on other names of flags that were read
        for group in groups:
            title = group._argument_group_name
            section = self.add_argument_group(title, group.__doc__)
            kinds = get_type_hints(group)
            given = [field for field in fields(group) if field.init]
            self.fixed |= {field.name for field in fields(group)} - {field.name for field in given}
            self.common |= {field.name for field in given if title in common}
            for field in given:
                self._add_flag(section, field, kinds[field.name])
        self.flags = {action.dest for action in self._actions}
        self.other_names = synonyms(self.flags)
        self.add_argument("-h", "--help", action=_Help, help="list the usual flags; --help all: all of them")
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
        if self.common:
            self.common |= {"help", "version", "config"}
            self.epilog = " ".join(filter(None, (self.epilog, f"--help all lists all {len(self._actions)} flags.")))

    def _add_flag(self, section: Any, field: Field, kind: Any) -> None:
        choices, options = (), {"help": field.metadata["help"], **field.metadata.get("options", {})}
        if get_origin(kind) in (Union, UnionType):
            kind, *words = (alternative for alternative in get_args(kind) if alternative is not NoneType)
            kind = _number_or_auto(kind) if words else kind
        if get_origin(kind) is list:
            (kind,), options["nargs"] = get_args(kind), "+"
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        if choices and "metavar" not in options:
            options["metavar"] = f"{{{','.join(choices)}}}"
        if kind is bool:
            kind, options["nargs"], options["const"] = _boolean, "?", True
        options["default"] = default_of(field)
        action = section.add_argument(f"--{field.name}", type=kind, choices=choices or None, **options)
        action.metavar = action.metavar or _metavar(action)
        if action.default is REQUIRED:
            action.default = None
            self.needed.append(action)
            action.help += " (required)"

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The flags that the words give, by name, with values of their types; no defaults.

        Raises:
            UserError: an unknown flag (with what to give instead), a value of another type, a stray word.
            SystemExit: 0, after `--help` and `--version`.
        """
        words = self._in_own_names(words)
        unset = argparse.Namespace(**{action.dest: _UNSET for action in self._actions})
        unset.config = None
        parsed, unknown = self.parse_known_args(words, unset)
        for name in self.words:
            if unknown and getattr(parsed, name) is _UNSET:
                setattr(parsed, name, unknown.pop(0))
        for word in unknown:
            hint = f": did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else f" ({ALL_LISTED})"
            raise UserError(f"unexpected argument {word!r}, which belongs to no flag{hint}")
        return {name: value for name, value in vars(parsed).items() if value is not _UNSET and value is not None}

    def _in_own_names(self, words: Sequence[str]) -> list[str]:
        """The words with this command's names of its flags. Raises UserError: an unknown flag, or one by two names.

        It comes first: where a needed flag is misspelt, argparse would just miss it.
        """
        own, names, whole = [], {}, False
        for word in words:
            if not self.words:  # where a text may be given, which may have several lines
                check_characters(word, "the command line")
            typed, equals, value = word.partition("=")
            if typed.startswith("--"):
                name = typed[2:].replace("-", "_")
                flag = self._flag_called(name, typed)
                before = names.setdefault(flag, name)
                require(before == name, f"--{before} and --{name} are the same flag: give one of them")
                whole = flag != name and self._option_string_actions[f"--{flag}"].type is int
                own.append(f"--{flag}{equals}{_as_integer(value) if whole else value}")
            else:
                own.append(_as_integer(word) if whole else word)
        return own

    def _flag_called(self, name: str, typed: str) -> str:
        flag = self.other_names.get(name, name)
        if f"--{flag}" not in self._option_string_actions:
            instead = what_instead(name, [action.dest for action in self._actions], self.other_names)
            raise UserError(f"unknown argument {typed}" + (f": {instead}" if instead else f" ({ALL_LISTED})"))
        if flag != name and (said := note(name, flag)):
            self.notes.append(said)
        return flag

    def leave_out(self, hidden: set[argparse.Action]) -> None:
        """Takes flags out of the help, and groups without others."""
        for action in hidden:
            action.help = argparse.SUPPRESS
        for group in self._action_groups:
            if hidden >= set(group._group_actions):
                group.description = None

    def check_needed(self, given: dict[str, Any]) -> None:
        """Refuses, UserError, flags without those that are required."""
        if missing := [action for action in self.needed if action.dest not in given]:
            names = (action.metavar if action.dest in self.words else action.option_strings[0] for action in missing)
            self.error(f"the following arguments are required: {', '.join(names)}")

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage first and bury the sentence, and repeats a value of any length.
        message = message if len(message) <= 500 else f"{message[:500]}..."
        raise UserError(f"{message} ({ALL_LISTED})")


class _Help(argparse.Action):
    def __init__(self, option_strings: Sequence[str], **settings: Any) -> None:
        super().__init__(option_strings, nargs="?", choices=("all",), metavar="all", **settings)

    def __call__(self, parser: Parser, namespace: argparse.Namespace, value: str | None, *_: Any) -> None:
        if parser.common and value is None:
            parser.leave_out({action for action in parser._actions if action.dest not in parser.common})
        parser.print_help()
        parser.exit()


def _as_integer(text: str) -> str:
    """3 for 3.0, as others write numbers of epochs; everything else as it is."""
    return re.sub(r"^(\d+)\.0+$", r"\1", text)


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return BOOLEANS[text.lower()]


def _number_or_auto(kind: type) -> Callable[[str], Any]:
    """What reads a flag of `int | Literal["auto"]`, or of float."""

    def read(text: str) -> Any:
        for reads in (int, kind):
            try:
                return AUTO if text == AUTO else reads(text)
            except ValueError:
                pass
        raise argparse.ArgumentTypeError(f"{text!r} is neither {AUTO} nor a {'whole ' * (kind is int)}number")

    return read


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
        flag = action.option_strings[-1]  # --help, without -h
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
