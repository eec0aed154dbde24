"""Every row has a test, and the page about them is that of the tests."""

from __future__ import annotations

import re

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
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    named = {name for text in texts for name in re.findall(r"^def (test_rows?_\d\w+)", text, re.MULTILINE)}
    assert named <= marked
