"""What the server of a sweep's processes imports, so that each run starts at once."""

import importlib

from stillhouse import console

console.quieten_imports()
for _name in ("stillhouse.runs.execute", "stillhouse.runs.teacher_cache", "stillhouse.runs.sweep.execute"):
    importlib.import_module(_name)
