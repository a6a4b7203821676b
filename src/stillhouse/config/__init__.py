"""Strict configuration: parts, registries, layered YAML with the origin of every value, errors with paths."""

from stillhouse.config.part import FilePath, Many, Part, Registry, nearest, walk

__all__ = ["FilePath", "Many", "Part", "Registry", "nearest", "walk"]
