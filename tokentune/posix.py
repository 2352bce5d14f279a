"""What the commands take of the system that Windows lacks: locks on files, limits and peaks of processes."""

try:
    import fcntl
    import resource
except ModuleNotFoundError as error:
    raise ImportError(
        "TokenTune's commands run on Linux and macOS: on Windows run them in WSL, the Windows Subsystem for Linux. "
        "(`import tokentune`, the method alone, needs nothing of that.)"
    ) from error

__all__ = ["fcntl", "resource"]
