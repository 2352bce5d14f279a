"""The folder that a merge writes: what may be replaced, and how it comes into place whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tokentune.errors import UserError
from tokentune.sources import first_line
from tokentune.training.checkpoints.saving import with_usual_modes

OUTPUT_FLAG = "--output_dir"
SUMMARY = "merge_summary.json"  # also the mark of a folder that a later merge may replace


def check_output_folder(output: Path, sources: Sequence[str]) -> None:
    """Refuses an output folder that is in use for something else, or cannot be written.

    Args:
        sources: the base's and the adapter's folder (or hub id), which the output must not replace.
    """
    target = output.resolve()
    for source in map(os.path.realpath, sources):
        if target == Path(source) or (os.path.exists(source) and target in Path(source).parents):
            raise UserError(f"{OUTPUT_FLAG} {output}: would replace {source}, which is read. Choose another folder.")
    if target.exists() and not target.is_dir():
        raise UserError(f"{OUTPUT_FLAG} {output}: is a file. Choose a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / SUMMARY).is_file():
        raise UserError(
            f"{OUTPUT_FLAG} {output}: holds something that is not an earlier merge (no {SUMMARY}). "
            "Empty it, or choose another folder."
        )


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """Yields an empty sibling folder, which takes `output`'s place whole when the block succeeds, else is removed.

    A sibling, because only within one file system is a rename one step. An earlier `output` is moved aside first
    and put back if the last step fails.

    Raises:
        UserError: the folder cannot be made there.
    """
    target = output.resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{OUTPUT_FLAG} {output}: cannot be written: {error.strerror}") from error
        yield partial
        with_usual_modes(partial)
        aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        if target.exists():
            target.rename(aside)
        try:
            partial.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):  # never made, or somebody else's files are in it by now
                parent.rmdir()
        raise


@contextmanager
def write_errors_refused() -> Iterator[None]:
    """Turns what happens on a full disk, above all, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{OUTPUT_FLAG}: the model could not be written: {first_line(error)}") from error
