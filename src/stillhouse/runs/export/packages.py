"""The packages that an export needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from stillhouse.errors import EnvironmentFault


def require_packages(target: str, to_write: Sequence[str], to_ask: str, smoke_test: bool) -> None:
    """Make sure that files of a target can be written, and asked.

    Args:
        target: of `--to`, which is the name of the extra as well.
        to_write: the packages that write the files.
        to_ask: the one that the smoke test loads them with.
        smoke_test: whether there is one.

    Raises:
        EnvironmentFault: a package is missing.
    """
    for package in (*to_write, *([to_ask] if smoke_test else ())):
        if importlib.util.find_spec(package) is None:
            way_out = ", or leave the smoke test out: --no-smoke-test" if package == to_ask else ""
            raise EnvironmentFault(
                f"--to {target} needs the package {package}. Install it with: "
                f"pip install 'stillhouse[{target}]'{way_out}"
            )
