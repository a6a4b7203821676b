"""What makes two runs of a sweep the same."""

from __future__ import annotations

import json
from collections.abc import Collection

from stillhouse.config.trees import plain
from stillhouse.runs.config import RunConfig


def configuration_key(config: RunConfig, but: Collection[str]) -> str:
    """A configuration as text without some of its sections and fields, such as {"name", "train.lr"}."""
    values = plain(config)
    for path in but:
        section, _, name = path.partition(".")
        if name:
            values[section].pop(name, None)
        else:
            values.pop(section, None)
    return json.dumps(values, sort_keys=True, default=str)
