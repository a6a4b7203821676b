"""Runs that differ in the training seed alone, which count as one system."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

from stillhouse.report.record import RunRecord

SEED = "train.seed"


def seed_groups(runs: Sequence[RunRecord]) -> list[list[int]]:
    """The indices of runs, those together that have the same settings and each its own seed."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        settings = {
            path: entry.value
            for path, entry in run.config.items()
            if path not in ("name", SEED) and not path.startswith("output.")
        }
        alone = {} if SEED in run.config else {"run": index}
        key = json.dumps([settings, run.status, alone], sort_keys=True, default=str)
        groups.setdefault(key, []).append(index)
    found = []
    for members in groups.values():
        seeds = {str(runs[index].config[SEED].value) for index in members if SEED in runs[index].config}
        found += [members] if len(seeds) == len(members) else [[index] for index in members]
    return sorted(found)


def group_of_each(runs: Sequence[RunRecord]) -> list[int]:
    """For each run the number of its group."""
    groups = seed_groups(runs)
    return [next(n for n, members in enumerate(groups) if index in members) for index in range(len(runs))]


def common_name(names: Sequence[str]) -> str:
    """What names of runs of several seeds share: `kd` of `kd-seed-1` and `kd-seed-2`."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    start = "".join(letters[0] for letters in same)
    if start == names[0]:
        return start
    return re.sub(r"[-_. ]+((seed|s)[-_. ]*)?\d*$", "", start) or names[0]


def name_of_seeds(names: Sequence[str]) -> str:
    """How runs of several seeds are called together, such as `kd (2 seeds)`; of one its own name."""
    return names[0] if len(names) == 1 else f"{common_name(names)} ({len(names)} seeds)"
