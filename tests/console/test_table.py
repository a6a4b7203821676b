"""One table, and what a terminal, Markdown, LaTeX, CSV and JSON make of it."""

from __future__ import annotations

import csv
import io

from rich.text import Text

from stillhouse.console import Table, TableCell, TableColumn, make_table, print_table
from tests.console.consoles import pipe, terminal, written

RESULTS = Table(
    [
        TableColumn("System", "system"),
        TableColumn("ROUGE-L", "rouge_l", numeric=True, better="higher"),
        TableColumn("KL to teacher", "kl", numeric=True, better="lower"),
    ],
    [
        [TableCell("kd", "kd"), TableCell(55.2101, "55.2", "± 0.3"), TableCell(None, "–")],
        [TableCell("a|b_c", "a|b_c"), TableCell(58.3, "58.3", "± 0.3", best=True), TableCell(0.16, "0.160")],
    ],
    title="e2e",
    note="Not measured alike: seeds.",
)


def test_a_table_in_a_pipe_is_as_wide_as_it_needs():
    console = pipe(width=30)
    rows = [["student after distillm2 with a long name", 57.125, 1_234_567, None]]
    print_table(["system", "ROUGE-L", "parameters", "KL"], rows, console=console)
    row = "student after distillm2 with a long name    57.12    1,234,567   –"
    assert [" ".join(line.split()) for line in written(console).splitlines()][-2] == " ".join(row.split())


def test_a_narrow_terminal_folds_text_and_keeps_numbers_whole():
    console = terminal(width=30)
    print_table(
        ["system", "count"], [["a rather long name that has to be folded", 1_234_567_890]], console=console
    )
    assert "1,234,567,890" in written(console)
    lines = [Text.from_ansi(line).plain.rstrip() for line in written(console).splitlines()]
    assert max(map(len, lines)) <= 30
    assert "…" not in written(console)


def test_text_is_never_read_as_markup():
    console = pipe()
    print_table(["path"], [["[bold]data[/bold][0]"]], console=console)
    assert "[bold]data[/bold][0]" in written(console)


def test_a_table_gives_the_terminal_no_orders():
    console = pipe()
    print_table(["name\x1b[2J"], [["\x1b]0;title\x07"]], title="[b]t\x1b", console=console)
    assert "\x1b" not in written(console)
    assert "[b]t␛" in written(console)


def test_markdown_marks_the_best_and_which_way_is_better():
    assert RESULTS.markdown().splitlines() == [
        "**e2e**",
        "",
        "| System | ROUGE-L ↑ | KL to teacher ↓ |",
        "| --- | --: | --: |",
        "| kd | 55.2 ± 0.3 | – |",
        r"| a\|b\_c | **58.3** ± 0.3 | 0.160 |",
        "",
        "Not measured alike: seeds.",
    ]


def test_latex_has_the_same_cells():
    lines = RESULTS.latex().splitlines()
    assert r"\begin{tabular}{lrr}" in lines
    assert r"\caption{e2e}" in lines
    assert r"kd & 55.2 $\pm$ 0.3 & -- \\" in lines
    assert r"a\textbar{}b\_c & \textbf{58.3} $\pm$ 0.3 & 0.160 \\" in lines
    assert any("Not measured alike: seeds." in line for line in lines)


def test_csv_and_records_hold_raw_values():
    rows = list(csv.DictReader(io.StringIO(RESULTS.csv())))
    assert rows[0] == {"system": "kd", "rouge_l": "55.2101", "kl": ""}
    assert RESULTS.records()[1] == {"system": "a|b_c", "rouge_l": 58.3, "kl": 0.16}


def test_the_terminal_shows_the_best_bold_and_the_note_in_one_line():
    console = terminal(width=40)
    RESULTS.print(console)
    assert "\x1b[1m58.3 ± 0.3\x1b[0m" in written(console)
    console = pipe(width=20)
    RESULTS.print(console)
    assert written(console).splitlines()[-1] == "Not measured alike: seeds."
    assert "KL to teacher" in written(console)


def test_columns_of_numbers_are_found():
    table = make_table(["setting", "value", "mixed"], [["a", 1.5, "57.1 ± 0.3"], ["b", None, "text"]])
    assert [column.numeric for column in table.columns] == [False, True, False]
    assert [cell.text for cell in table.rows[1]] == ["b", "–", "text"]
