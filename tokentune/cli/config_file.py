"""Settings in a file: what `--config run.yaml` reads, and the `run.yaml` that every run leaves, which reruns it.

    model_name_or_path: ./my-llama
    dataset_name_or_path: [rows.jsonl, more.jsonl]
    tokentune: true
    prefix_length: 0.3
    learning_rate: 4e-4

Each entry becomes the words of its flag, which argparse gives their types: texts are taken as they are written, so that
prefix_length's 1.0 is not 1, and chunked_loss's on is no boolean. Relative paths are found from the current folder.

PyYAML's safe loader composes the file into nodes, which know their lines, and never makes objects of them.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tokentune.cli.other_names import synonyms, what_instead
from tokentune.cli.parser import ALL_LISTED, Parser
from tokentune.errors import UserError
from tokentune.file_names import RUN_CONFIG_NAME
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import check_characters, require
from tokentune.settings.run import STARTING
from tokentune.training.checkpoints.saving import write_whole

TAG = "tag:yaml.org,2002:"
TAGS = {f"{TAG}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")}


# ------------------------------------------------------------------------------------------------------------- reading


def read_config(path: str, parser: Parser) -> dict[str, Any]:
    """The settings of a file by name, each of its flag's type; of `parser.fixed` too, with None.

    Raises:
        UserError: no such file, no YAML, no mapping, a key that is no flag (with what to give instead), two keys of one
            flag, a value of another type; with the line.
    """
    known = parser.flags | parser.fixed
    other_names = synonyms(known)
    settings: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for key, node in _entries(path):
        where = f"--config {path}, line {key.start_mark.line + 1}"
        scalar = isinstance(key, yaml.ScalarNode)
        name = key.value.lstrip("-").replace("-", "_") if scalar else ""
        flag = other_names.get(name, name)
        if flag not in known:
            hint = what_instead(name, known, other_names) or f"{ALL_LISTED}."
            raise UserError(f"{where}: {_short(key.value) if scalar else 'a list'} is no flag of this command; {hint}")
        before = seen.get(flag)
        twice = f"{name} occurs twice" if before == name else f"{before} and {name} are the same flag"
        require(before is None, f"{where}: {twice}. Leave one of them out.")
        seen[flag] = name
        try:
            settings |= {flag: None} if flag in parser.fixed else _setting(flag, name, node, parser)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return settings


def _setting(flag: str, name: str, node: yaml.Node, parser: Parser) -> dict[str, Any]:
    """The setting that a node is, typed by the parser; nothing where it leaves an optional flag out (null)."""
    action = parser._option_string_actions[f"--{flag}"]
    several = isinstance(node, yaml.SequenceNode)
    require(not several or action.nargs == "+", f"{name} takes one value, not a list")
    nodes = node.value if several else [node]
    for each in nodes:
        found = {yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}.get(type(each), each.tag)
        require(isinstance(each, yaml.ScalarNode) and each.tag in TAGS, f"{name}: {found} is no value of a flag")
        check_characters(each.value, name)
    if node.tag == f"{TAG}null" and action.default is None and action not in parser.needed:
        return {}
    require(all(each.tag != f"{TAG}null" for each in nodes), f"{name} is empty (null)")
    if several and len(nodes) != 1:
        return parser.read([f"--{name}", *(each.value for each in nodes)]) if nodes else {flag: []}
    return parser.read([f"--{name}={nodes[0].value}"])


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


def _short(text: str) -> str:
    """What a file holds, as a message shows it: on one line, and not all of a long one."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


# ------------------------------------------------------------------------------------------------------------- writing


def write_config(
    arguments: Arguments,
    run_folder: Path,
    words: Sequence[str],
    versions: Mapping[str, str | None],
    auto: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `run.yaml`: every flag with its value, which `--config` reads. No environment variable is in it.

    Args:
        words: the command line that was given, for the file's heading.
        versions: of the libraries, for the heading too.
        auto: what flags given as `auto` came to, for the heading too; None: nothing is known.
    """
    heading = [
        f"Settings of a run of tokentune/{arguments.prog}; this reruns it, from the same folder:",
        f"    python tokentune/{arguments.prog} --config {shlex.quote(str(run_folder / RUN_CONFIG_NAME))} "
        "--overwrite_output_dir",
        f"It was started {datetime.now(UTC).isoformat(timespec='seconds')} in {Path.cwd()} as",
        f"    {shlex.join([arguments.prog, *words])}",
        "with " + ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None),
    ]
    if auto:
        heading.append("auto came to " + " ".join(f"--{name} {value}" for name, value in auto.items()))
    parts = ["".join(f"# {_printable(line)}\n" for line in heading)]
    for name, group in asdict(arguments).items():
        settings = {flag: value for flag, value in group.items() if flag not in STARTING}
        title = type(getattr(arguments, name))._argument_group_name
        if settings:
            parts.append(f"\n# {title}\n{_dumped(settings)}")
    path = run_folder / RUN_CONFIG_NAME
    run_folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(parts))
    return path


def _dumped(settings: dict[str, Any]) -> str:
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != settings:  # the line breaks of Unicode are written as they are, and read as spaces
        text = yaml.safe_dump(settings, sort_keys=False)
    return text


def _printable(line: str) -> str:
    """For a comment: a line break in an argument would end it, and the rest be read as settings."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
