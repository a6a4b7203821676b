"""The versions of installed packages, for records that say what made a result."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str) -> str:
    """The version of a package; "unknown" where it has no metadata, as a source tree on the path has not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
