"""Every row has a test, and the page about them is that of the tests."""

from __future__ import annotations

import ast

from faults import rows
from surroundings import ROOT


def test_every_row_is_held_by_a_test():
    assert {row for row, _, _ in rows.tests_of_rows()} == rows.ROWS.keys()


def test_the_page_lists_the_tests_as_they_are():
    text = rows.README.read_text(encoding="utf-8")
    told = rows.statuses(text)
    assert text == rows.table(told), "write it anew: make rows"
    assert set(told.values()) <= {"passes", "skipped"}, "a row fails"


def test_every_name_that_says_a_row_is_marked_with_it():
    """A test called test_row_41_… would otherwise be missing from the page unnoticed."""
    marked = {test for _, _, test in rows.tests_of_rows()}
    named = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("test_row_", "test_rows_"))
    }
    assert named <= marked
