"""A strategy by its name: a built-in one, or the user's own from a file, `--selection path/file.py:function`."""

import difflib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from zlib import crc32

import torch

from tokentune.sampling.strategies import REGISTRY, SECOND_NAMES, Choice, Registered, Tokens, answer_of


def find_strategy(name: str) -> Registered:
    """The strategy of that name, or the function of `path/file.py:function`, whose file is run.

    Raises ValueError for an unknown name (the message names the nearest strategy, and all), or a wrong file.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if ":" in name or name.endswith(".py"):
        return load_strategy(name)
    close = difflib.get_close_matches(name, REGISTRY, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    known = ", ".join(known for known in REGISTRY if known not in SECOND_NAMES)
    raise ValueError(f"{name}: there is no such strategy.{hint} Known are {known}; your own: file.py:function")


def load_strategy(name: str) -> Registered:
    """Runs the file and returns its function, registered under `name`, after a trial on a small batch.

    The function may be a plain one that takes `Tokens`, or one that the file registers (`@strategy`), with its needs.
    Raises ValueError for a missing file or function, an error in one of them, or an invalid answer.
    """
    file, _, function = name.rpartition(":")
    if not file or not function:
        raise ValueError(f"{name}: a strategy of your own is named file.py:function")
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{name}: there is no Python file {file}")
    module = _run(path, name)
    choose = getattr(module, function, None)
    if choose is None and function in REGISTRY and REGISTRY[function].choose.__module__ == module.__name__:
        choose = REGISTRY[function].choose
    if not callable(choose) or inspect.isclass(choose):
        raise ValueError(f"{name}: {file} has no function {function}")
    needs = next((entry.needs for entry in REGISTRY.values() if entry.choose is choose), ())
    registered = Registered(name, choose, needs)
    try_strategy(registered)
    REGISTRY[name] = registered
    return registered


def _run(path: Path, name: str) -> ModuleType:
    """The file as a module; the import path does not change."""
    resolved = path.resolve()
    known_as = f"tokentune_strategy_{path.stem}_{crc32(str(resolved).encode()):x}"
    spec = importlib.util.spec_from_file_location(known_as, resolved)
    module = importlib.util.module_from_spec(spec)
    sys.modules[known_as] = module  # dataclasses and pickle search for modules there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[known_as]
        raise ValueError(f"{name}: running {path} ended in {type(error).__name__}: {error}") from error
    return module


def try_strategy(registered: Registered) -> Choice:
    """Calls it on two rows, the second one padded, and returns its answer. Raises ValueError unless that is valid."""
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    ids = torch.arange(1, 13).reshape(2, 6)
    labels = torch.where(torch.tensor([False, False, False, True, True, True]) & real, ids, -100)
    targets = torch.cat([labels[:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 6, generator=generator)
    scores = {score: torch.rand(2, 6, generator=generator) * targets for score in registered.needs}
    tokens = Tokens(real, uniform, torch.tensor([3, 2]), ids, labels, targets, scores=scores)
    try:
        answer = registered.choose(tokens)
    except Exception as error:
        raise ValueError(f"{registered.name}: it ended in {type(error).__name__}: {error}") from error
    return answer_of(registered._replace(choose=lambda _: answer), tokens)
