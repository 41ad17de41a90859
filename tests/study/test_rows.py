"""Rows that are not the study's, or were edited by hand, are refused in one line."""

import json

import pytest

from moe_erc.checks import BadInput
from moe_erc.study import rows


def row(plan, arm="vanilla", seed=0, **changes):
    fields = {
        "arm": arm,
        "seed": seed,
        "config": plan.settings[arm].values,
        "corpus": "c",
        "outcome": 2.0,
    }
    return rows.signed(fields | changes)


def write(plan, *found):
    plan.rows_path.parent.mkdir(exist_ok=True)
    plan.rows_path.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")


def test_rows_are_read_as_they_were_written(make_plan):
    plan = make_plan()
    assert rows.read_rows(plan) == []
    found = [row(plan), row(plan, "erc", 1000)]
    write(plan, *found)
    assert rows.read_rows(plan) == found


def test_a_row_that_was_edited_is_refused_with_its_line(make_plan):
    plan = make_plan()
    write(plan, row(plan), row(plan, seed=1) | {"outcome": 1.0})
    with pytest.raises(
        BadInput, match=r"small.jsonl', line 2: the digest fails, so the row was edited"
    ):
        rows.read_rows(plan)


def test_a_line_that_is_no_row_is_refused(make_plan):
    plan = make_plan()
    for line in ("{", "3", "{}"):
        plan.rows_path.parent.mkdir(exist_ok=True)
        plan.rows_path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(BadInput, match="line 1"):
            rows.read_rows(plan)


@pytest.mark.parametrize("changes, words", [
    ({"arm": "other"}, "is of no arm of the study"),
    ({"seed": 0}, "there twice"),
    ({"corpus": "d"}, "the corpus d, and vanilla-0 with c"),
])  # fmt: skip
def test_rows_of_something_else_are_refused(make_plan, changes, words):
    plan = make_plan()
    write(plan, row(plan), rows.signed(row(plan, seed=1) | changes))
    with pytest.raises(BadInput, match=words):
        rows.read_rows(plan)


def test_a_row_of_another_config_is_refused_with_the_key_that_differs(make_plan):
    plan = make_plan()
    write(plan, row(plan, config=dict(plan.settings["vanilla"].values) | {"train.batch_size": 16}))
    with pytest.raises(BadInput, match=r"train.batch_size is 16 there and 8 in the study"):
        rows.read_rows(plan)


def test_a_key_that_is_younger_than_a_row_has_to_have_its_default(make_plan):
    plan = make_plan()
    old = {
        key: value
        for key, value in plan.settings["vanilla"].values.items()
        if key != "losses.erc.alpha"
    }
    write(plan, row(plan, config=old | {"an.old.key": 3}))
    assert len(rows.read_rows(plan)) == 1
    other = make_plan(overrides="{**SHORT, 'losses.erc.alpha': 2.0}")
    with pytest.raises(BadInput, match=r"losses.erc.alpha is 1.0 there and 2.0"):
        rows.read_rows(other)


def test_the_digest_does_not_depend_on_the_order_of_keys(make_plan):
    one = row(make_plan())
    assert rows.signed(dict(reversed(one.items()))) == one
