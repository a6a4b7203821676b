"""The best trained student of the first task in three or four figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.console.format import is_number
from stillhouse.report.metrics import MetricInfo, main_metric, metric_info
from stillhouse.report.ranking import best_students
from stillhouse.report.results import TaskResults, change_of, comparable, spread
from stillhouse.report.systems import System, baseline, measured_differently, teacher_of


@dataclass(frozen=True, slots=True)
class Headline:
    """What stands above the results. Example: `Headline("kd", "--run-0", "", (("57.1", "ROUGE-L", ""),))`"""

    label: str
    colour: str
    remark: str
    """Whether it is the best, and which cannot be told apart from it; empty where it is the only student."""
    figures: tuple[tuple[str, str, str], ...]
    """A value, what it is, and more about it."""


def headline(systems: Sequence[System], results: Sequence[TaskResults]) -> Headline | None:
    """None where nothing was evaluated, or where the students were not measured alike."""
    if not results or len(results[0].table.columns) == 1:
        return None
    here = [system for system in systems if system.task == results[0].task]
    main = main_metric(system.metrics for system in here)
    students = [s for s in here if s.role == "after" and main and is_number(s.metrics.get(main.name))]
    if main is None or not students or measured_differently(students):
        return None
    sign = -1 if main.better == "lower" else 1
    best = max(students, key=lambda system: sign * system.metrics[main.name])
    figures = _figures(main, best, here) + _ratios(best, comparable(best, teacher_of(here, best)), systems)
    return Headline(best.label, best.colour, _remark(main, best, students), tuple(figures))


def _remark(main: MetricInfo, best: System, students: Sequence[System]) -> str:
    if len(students) == 1:
        return ""
    count = f" on {best.prompts:,} prompts" if best.prompts else ""
    by = f" by {main.label if main.better == 'higher' else f'the lowest {main.label}'}{count}"
    tied = [system.label for system in best_students(main, students) if system is not best]
    if not tied:
        known = bool(best_students(main, students))
        return f"is best{by}" if known else f"is first{by}; how sure that is cannot be told"
    names = ", ".join(tied[:3]) + (f" and {len(tied) - 3} more" if len(tied) > 3 else "")
    return f"is first{by}, but cannot be told apart from {names}"


def _figures(main: MetricInfo, best: System, here: Sequence[System]) -> list[tuple[str, str, str]]:
    value = best.metrics[main.name]
    before, teacher = comparable(best, baseline(here, best)), comparable(best, teacher_of(here, best))
    start = before.metrics.get(main.name) if before else None
    top = teacher.metrics.get(main.name) if teacher else None
    count = f"{best.prompts:,} prompts" if best.prompts else ""
    sure = spread(main, best)
    details = [", ".join(filter(None, (f"{sure} (95% interval)" if sure else "", count)))]
    if before is not None and is_number(start):
        text, better = change_of(main, best, before)
        unsure = ", which may be chance" if better is None else ""
        details.append(f"{text} against the student before{unsure}")
    figures = [(main.show(value), main.label, "; ".join(filter(None, details)))]
    sign = -1 if main.better == "lower" else 1
    if is_number(start) and is_number(top) and sign * (top - start) > 0:
        closed = (value - start) / (top - start)
        reach = f"from {main.show(start)} to the teacher's {main.show(top)}"
        figures.append((f"{closed:.0%}", "of the gap closed", reach))
    return figures


def _ratios(student: System, teacher: System | None, systems: Sequence[System]) -> list[tuple[str, str, str]]:
    """How much smaller than the teacher and, by the task `cost`, how much faster."""
    found = []
    own, other = _of_both("parameters", student, teacher)
    if own and other and other / own >= 1.05:
        size = metric_info("parameters")
        shown = f"{size.show(own)} against {size.show(other)} parameters"
        found.append((f"{other / own:.1f}×", "smaller", shown))
    for system in systems:
        ratio = system.metrics.get("decode_speed_up")
        if system.who == student.who and is_number(ratio) and ratio > 0:
            timed = "decoding, the two timed in turns"
            slower = ratio < 1
            found.append((f"{1 / ratio if slower else ratio:.1f}×", "slower" if slower else "faster", timed))
            break
    return found


def _of_both(name: str, student: System, teacher: System | None) -> tuple[float, float]:
    values = (student.metrics.get(name), teacher.metrics.get(name) if teacher else None)
    own, other = (float(value) if is_number(value) else 0.0 for value in values)
    return own, other
