"""How long the report takes to write and to open, in a real headless Chromium, for runs of many responses.

python benchmarks/report.py            # 2,000 prompts; writes benchmarks/results/report.json
python benchmarks/report.py --small    # 200 prompts, writes nothing

Every system answers every prompt. The page is opened several times with empty caches; the times are the
browser's own, from the start of the navigation to the end of the load event. Processor seconds are those of
the page's main thread: parsing, scripts, styles and layout, which other work on the machine hardly touches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from _result import result, save
from tests.report.browser import Page, browser, chromium
from tests.report.made_runs import make_run

from stillhouse.report import write_report

RESULT = Path(__file__).parent / "results" / "report.json"
TIMES = """(() => {
  const entry = performance.getEntriesByType("navigation")[0];
  return {dom: entry.domContentLoadedEventEnd, load: entry.loadEventEnd};
})()"""


def opened(page: Page, path: Path, times: int) -> dict[str, float]:
    """Medians over so many openings, in seconds."""
    found = []
    page.call("Performance.enable", timeDomain="threadTicks")
    for _ in range(times):
        page.call("Network.clearBrowserCache")
        page.call("Page.navigate", url="about:blank")
        page.until("location.protocol === 'about:'")
        before = busy(page)
        page.open(path, width=1440)
        page.until(f"{TIMES}.load > 0")
        found.append({**page.do(TIMES), "busy": 1000 * (busy(page) - before)})
        assert page.troubles == [], page.troubles
    return {name: round(statistics.median(one[name] for one in found) / 1000, 3) for name in found[0]}


def busy(page: Page) -> float:
    """Processor seconds of the tab's main thread so far."""
    counted = page.call("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in counted if one["name"] == "TaskDuration"))


def searched(page: Page) -> float:
    """Seconds from a change of the search field to the list, without the pause for typing."""
    script = """(() => {
      const box = document.getElementById("answer-search");
      box.value = "zizzi";
      const start = performance.now();
      document.getElementById("answer-order").dispatchEvent(new Event("change"));
      return performance.now() - start;
    })()"""
    return round(page.do(script) / 1000, 3)


def measured(folder: Path, runs: int, prompts: int, times: int) -> dict[str, object]:
    """One row: so many runs, each with a teacher, a student before and a student after."""
    place = folder / f"{runs}-{prompts}"
    for number in range(runs):
        make_run(place / f"run-{number}", ("kd", "distillm2", "gkd")[number % 3], rows=prompts, tasks=True)
    start = time.process_time()
    path = write_report([place], place / "report.html")
    written = time.process_time() - start
    with browser(folder / f"profile-{runs}-{prompts}") as page:
        times_open = opened(page, path, times)
        return {
            "runs": runs,
            "prompts": prompts,
            "megabytes": round(path.stat().st_size / 1e6, 2),
            "write_processor_seconds": round(written, 2),
            "dom_content_loaded_seconds": times_open["dom"],
            "load_seconds": times_open["load"],
            "load_processor_seconds": times_open["busy"],
            "search_seconds": searched(page),
            "elements": page.do("document.querySelectorAll('*').length"),
        }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="200 prompts, no result file")
    small = parser.parse_args().small
    program = chromium()
    if program is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    sizes = [(1, 200)] if small else [(1, 2000), (3, 2000), (8, 2000)]
    with tempfile.TemporaryDirectory() as name:
        rows = [measured(Path(name), runs, prompts, 2 if small else 7) for runs, prompts in sizes]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = result(
        rows,
        ("matplotlib", "jinja2"),
        versions={"chromium": version.strip()},
        threads=1,
        load_average=round(os.getloadavg()[0], 1),
    )
    print(json.dumps(found, indent=2))
    save(None if small else RESULT, found)


if __name__ == "__main__":
    main()
