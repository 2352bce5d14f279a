"""Settings in a file: what `--config run.yaml` reads, and the `run.yaml` that every run leaves, which reruns it.

    model_name_or_path: ./my-llama
    dataset_name_or_path: [rows.jsonl, more.jsonl]
    tokentune: true
    prefix_length: 0.3
    learning_rate: 4e-4

Keys are flags without their dashes, values have the flags' types, and relative paths are found from the current folder,
as those of flags are. Flags on the command line come after the file: they override it (`--bf16 false`).

The file is composed into YAML's nodes by PyYAML's safe loader, and never made into objects: what a tag asks for is not
done, and an error can name its line.
"""

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from tokentune.errors import UserError
from tokentune.settings.flags import check_characters

if TYPE_CHECKING:
    from tokentune.settings.finetune import Arguments

RUN_CONFIG_NAME = "run.yaml"
# How a run was started, not what it does: whoever reruns it says anew whether to replace, go on, look, or upload.
STARTING = (
    *("overwrite_output_dir", "resume_from_checkpoint", "preview", "dry_run", "print_run_folder"),
    *("push_to_hub", "hub_public"),
)
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
TAG = "tag:yaml.org,2002:"
TAGS = {f"{TAG}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(path: str, groups: Sequence[type]) -> dict[str, Any]:
    """The settings of a file, each of its flag's type.

    Args:
        groups: the dataclasses of a command's flags.

    Raises:
        UserError: no such file, no YAML, no mapping, a key that is no flag (with the nearest one) or occurs twice, a
            value of another type; with the line.
    """
    types = {name: kind for group in groups for name, kind in get_type_hints(group).items()}
    types = {field.name: types[field.name] for group in groups for field in fields(group)}
    settings: dict[str, Any] = {}
    for key, node in _entries(path):
        where = f"--config {path}, line {key.start_mark.line + 1}"
        scalar = isinstance(key, yaml.ScalarNode)
        name = key.value.lstrip("-").replace("-", "_") if scalar else ""
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all flags."
            raise UserError(f"{where}: {short(key.value) if scalar else 'a list'} is no flag of this command; {hint}")
        if name in settings:
            raise UserError(f"{where}: {name} occurs twice. Leave one of them out.")
        settings[name] = _value(node, types[name], f"{where}: {name}")
    return settings


def _entries(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values, as nodes that know their lines."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text (byte {error.start}).") from error
    except ValueError as error:  # a null byte in the path
        raise UserError(f"--config {path!r}: no path: {error}.") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"--config {path}{line}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"--config {path}, line {line}: not valid YAML: a character that it does not allow.") from error
    except RecursionError as error:
        raise UserError(f"--config {path}: not a list of flags: it is nested too deeply.") from error
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: expected flags with their values, one a line (learning_rate: 4e-4).")
    return root.value


def _value(node: yaml.Node, kind: Any, where: str) -> Any:
    """A node as a value of a flag's type. Raises UserError with `where` (file, line, flag)."""
    alternatives = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    (kind,) = (alternative for alternative in alternatives if alternative is not NoneType)
    if node.tag == f"{TAG}null" and NoneType in alternatives:
        return None
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [_scalar(entry, item, where) for entry in items]
    return _scalar(node, kind, where)


def _scalar(node: yaml.Node, kind: Any, where: str) -> Any:
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    wanted = f"one of {', '.join(choices)}" if choices else NAMES[kind]
    if not isinstance(node, yaml.ScalarNode) or node.tag not in TAGS:
        found = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}.get(type(node), node.tag)
        raise UserError(f"{where} must be {wanted}, not {found}.")
    # Texts are taken as they are written: prefix_length's 1.0 is not 1, and chunked_loss's on is no boolean.
    text, plain = node.value, node.style is None
    value: Any = None
    if choices:
        value = text if text in choices else None
    elif kind is str:
        value = None if node.tag == f"{TAG}null" else text
    elif kind is bool and node.tag == f"{TAG}bool":
        value = yaml.SafeLoader.bool_values[text.lower()]
    elif kind is int and plain and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,17})", text):
        value = int(text)
    elif kind is float and plain:
        # YAML 1.1 takes 4e-4, which has no point, for a text.
        value = float(text) if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) else None
    if value is None:
        quoted = "" if plain else " (a text, in quotes)"
        raise UserError(f"{where} must be {wanted}, not {short(text) if text else 'empty'}{quoted}.")
    check_characters(text, where)
    return value


def short(text: str) -> str:
    """What a file holds, as a message shows it: on one line, and not all of a long one."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ------------------------------------------------------------------------------------------------------------- writing


def write_config(
    arguments: "Arguments", run_folder: Path, words: Sequence[str], versions: Mapping[str, str | None]
) -> Path:
    """Writes `run.yaml`: every flag with its value, which `--config` reads. No environment variable is in it.

    Args:
        words: the command line that was given, for the file's heading.
        versions: of the libraries, for the heading too.
    """
    heading = [
        f"Settings of a run of tokentune/{arguments.prog}; this reruns it, from the same folder:",
        f"    python tokentune/{arguments.prog} --config {shlex.quote(str(run_folder / RUN_CONFIG_NAME))} "
        "--overwrite_output_dir",
        f"It was started {datetime.now(UTC).isoformat(timespec='seconds')} in {Path.cwd()} as",
        f"    {shlex.join([arguments.prog, *words])}",
        "with " + ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None),
    ]
    parts = ["".join(f"# {_printable(line)}\n" for line in heading)]
    for name, group in asdict(arguments).items():
        settings = {flag: value for flag, value in group.items() if flag not in STARTING}
        title = type(getattr(arguments, name))._argument_group_name
        if settings:
            parts.append(f"\n# {title}\n{_dumped(settings)}")
    path = run_folder / RUN_CONFIG_NAME
    run_folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".yaml.tmp")
    unfinished.write_text("".join(parts), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _dumped(settings: dict[str, Any]) -> str:
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != settings:  # the line breaks of Unicode are written as they are, and read as spaces
        text = yaml.safe_dump(settings, sort_keys=False)
    return text


def _printable(line: str) -> str:
    """For a comment: a line break in an argument would end it, and the rest be read as settings."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
