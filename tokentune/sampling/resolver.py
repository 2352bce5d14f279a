"""A strategy by its name: a built-in one, or `file.py:function`."""

import difflib

from tokentune.sampling.strategies import REGISTRY, SECOND_NAMES, Registered
from tokentune.sampling.user_strategies import load_strategy


def find_strategy(name: str) -> Registered:
    """The strategy of that name, or the function of `path/file.py:function`, whose file is run.

    Raises:
        ValueError: there is no such strategy (the message names the nearest one, and all), or the file is wrong.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    if ":" in name or name.endswith(".py"):
        return load_strategy(name)
    close = difflib.get_close_matches(name, REGISTRY, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    known = ", ".join(known for known in REGISTRY if known not in SECOND_NAMES)
    raise ValueError(f"{name}: there is no such strategy.{hint} Known are {known}; your own: file.py:function")
