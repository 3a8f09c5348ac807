"""Which version of a package is installed. Imports nothing of any weight."""

from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str | None:
    """None where pip knows of no such package: not installed, or run from a folder that was only copied."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
