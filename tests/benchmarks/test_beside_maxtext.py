"""The table of our step beside MaxText's, with results that are given."""

from benchmarks import beside_maxtext


def found(seconds, allocated, sent):
    step = {"best": seconds - 1, "likely": seconds, "worst": seconds + 1}
    parts = {part: {"likely": seconds / 4} for part in beside_maxtext.PARTS}
    return {
        "outcome": "fits",
        "estimate": {"step": step, **parts},
        "allocated": allocated * 2**30,
        "sent": sent * 1e9,
    }


def test_the_last_row_of_a_size_is_the_ratio():
    rows = beside_maxtext.rows_of("tiny", found(6, 30, 60), found(4, 20, 50))
    assert rows == [
        ("tiny", "ours", "6.00", "5.0-7.0", *["1.50"] * 4, "30", "60.0"),
        ("", "MaxText", "4.00", "3.0-5.0", *["1.00"] * 4, "20", "50.0"),
        ("", "ours / MaxText", "1.50", *[""] * 5, "1.50", "1.20"),
    ]
    assert {len(row) for row in rows} == {len(beside_maxtext.HEADING)}


def test_a_size_without_maxtext_has_one_row():
    assert len(beside_maxtext.rows_of("tiny", found(6, 30, 60), None)) == 1


def test_a_size_that_fails_says_why_and_the_others_follow():
    failed = {"outcome": "fails", "why": "Check failed: no tile"}
    rows = beside_maxtext.rows_of("tiny", failed, found(4, 20, 50))
    assert rows[0][:3] == ("tiny", "ours", "fails: Check failed: no tile")
    assert rows[1][1:3] == ("MaxText", "4.00") and len(rows) == 2
    assert {len(row) for row in rows} == {len(beside_maxtext.HEADING)}


def test_the_table_is_markdown():
    lines = beside_maxtext.markdown([("", "a"), ("b", "1 | 2")]).splitlines()
    assert lines == ["|  | a |", "|---|---|", "| b | 1 \\| 2 |"]


def test_maxtext_has_all_that_a_row_shows():
    for size, maxtext in beside_maxtext.MAXTEXT.items():
        row = beside_maxtext.rows_of(size, found(6, 30, 60), maxtext)[1]
        assert all(row[1:])
