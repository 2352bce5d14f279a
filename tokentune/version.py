"""The version of this package, which its metadata says too."""

__version__ = "0.1.0"
