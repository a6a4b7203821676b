"""What the server of a sweep's processes imports, so that each run starts at once."""

import gc
import importlib

from stillhouse import console

console.quieten_imports()
for _name in (
    "rouge_score.rouge_scorer",
    "stillhouse.runs.execute",
    "stillhouse.runs.sweep.execute",
    "stillhouse.runs.teacher_cache",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # what a run collects is its own: reading all of this would copy it into each process
