"""Tables: texts are data, whatever they hold."""

import csv

import pytest

from stepdistill.reporting.blocks import Facts, Text, Verdicts
from stepdistill.reporting.page import Report
from stepdistill.reporting.table import Line, Table, write_csv
from stepdistill.reporting.values import Measured

NAME = "`x` | <script>alert(1)</script>"


def test_a_name_breaks_no_page() -> None:
    blocks = [Table([NAME], [Line("", [NAME])]), Facts([(NAME, NAME)]), Text(NAME)]
    text = Report(NAME, [(NAME, [*blocks, Verdicts([("", NAME, NAME, NAME)])])]).html()
    assert "<script>" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 12


@pytest.mark.parametrize("name", [NAME, "a\\| b", "two\nlines | c", "end\\"])
def test_a_name_is_one_cell_of_a_markdown_table(name: str) -> None:
    table = Table(["", "1 step"], [Line("", [name, "2.0"]), Line("", [name])]).markdown()
    lines = table.splitlines()
    assert len(lines) == 4
    for line in lines:
        plain = line.replace("\\\\", "").replace("\\|", "")  # escaped backslashes, then bars
        assert plain.count("|") == 3


def test_a_csv_gives_a_name_back(tmp_path) -> None:
    write_csv(tmp_path / "a.csv", [{"name": NAME, "steps": 1}, {"name": "b"}])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [(row["name"], row["steps"]) for row in csv.DictReader(file)] == [
            (NAME, "1"), ("b", ""),
        ]  # fmt: skip


def test_a_measured_value_has_its_spread_and_count() -> None:
    value = Measured.of([1.0, 2.0, 3.0])
    assert (value.mean, value.std, value.n) == (2.0, 1.0, 3)
    assert value.text(".1f", 100) == "200.0 ± 100.0"
    assert Measured.of([0.5]).text() == "0.50"
