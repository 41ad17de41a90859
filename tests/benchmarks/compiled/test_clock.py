"""The clock, on a program whose times a human can work out."""

import pathlib

import pytest

from benchmarks.compiled import chips, clock, costs
from benchmarks.compiled.costs import Collective

PROGRAM = (pathlib.Path(__file__).parent / "programs" / "clock.hlo").read_text()
CUBE = chips.CHIPS["v5p"]._replace(sides=chips.sides_of("v5p:4x4x4"))
# One cycle, one FLOP, one byte of memory and one of a link take a second each.
UNITS = CUBE._replace(flops=1, bandwidth=1, link=1, clock=1)
FACTS = {"mesh": {"data": 16, "expert": 4}, "expert_rows": 2048}
CHUNKS = 8


def test_cycles_are_multiplied_by_the_turns_of_loops():
    found = clock.work(PROGRAM, expert_axis=1, expert_rows=2048)
    # Copy 500, twelve layers of 1,000; eight chunks of 400, each with (2048 / 512 + 1/2) / 8 turns
    # of 10.
    turns = (2048 / clock.BLOCK + 0.5) / CHUNKS
    assert found.cycles == 500 + 12 * 1000 + CHUNKS * (400 + turns * 10)


def test_of_chunks_those_of_own_experts_are_computed_and_the_others_skipped():
    found = clock.work(PROGRAM, expert_axis=4, expert_rows=2048)
    turns = (2048 / clock.BLOCK + 0.5) / 2
    chunks = 2 * (400 + turns * 10) + 6 * 40
    assert found.cycles == pytest.approx(500 + 12 * 1000 + chunks)


def test_grouped_matmuls_count_as_if_all_rows_were_of_own_experts():
    # 16 tiles of 128 rows, and 3 visits more: one for each boundary between 4 groups.
    every_chunk = CHUNKS * 2 * 2048 * 64 * 32 * 19 / 16
    for expert_axis in (1, 4):
        found = clock.work(PROGRAM, expert_axis, expert_rows=2048)
        assert found.grouped_flops == pytest.approx(every_chunk)


def test_rows_and_sorts():
    found = clock.work(PROGRAM, expert_axis=1, expert_rows=2048)
    gathered = 3 * 1024 * 64 * 2
    scattered = 6 * 16 * 64 * 4
    assert found.row_bytes == gathered + scattered
    # 1,024 elements are one vector and 10 * 11 / 2 stages; two arrays, two cycles each.
    assert found.sort_cycles == 2 * 55 * 2
    # `fusion.4` has neither cycles nor rows.
    assert found.unknown == 1


@pytest.mark.parametrize("topology, kind, group, noted, links", [
    ("v5p:4x4x4", "all-gather", 4, 0, 2),  # a ring
    ("v5p:4x4x4", "all-gather", 8, 0, 2),  # a ring, and half of another side
    ("v5p:4x4x4", "all-gather", 16, 0, 4),  # a plane
    ("v5p:4x4x4", "all-gather", 64, 0, 6),
    ("v5p:4x4x4", "all-gather", 64, 2, 2),  # as libtpu notes
    ("v5p:4x4x4", "all-gather", 2, 0, 1),
    ("v5p:2x4x4", "all-gather", 32, 0, 3),  # all sides are open
    ("v5e:8x8", "all-gather", 64, 0, 2),  # both sides are open
    ("v5e:16x16", "all-gather", 256, 0, 4),
    ("v5p:4x4x4", "all-to-all", 64, 0, 2),
])  # fmt: skip
def test_a_collective_takes_its_bytes_over_the_rate_of_its_links(
    topology, kind, group, noted, links
):
    chip = UNITS._replace(sides=chips.sides_of(topology))
    collective = Collective(kind, (), 6400, group, False, "", times=3, links=noted)
    found = clock.collective_seconds(collective, chip)
    sent = 3 * 6400 * (group - 1) / group
    for seconds, share in zip(found, clock.LINK, strict=True):
        assert seconds == pytest.approx(sent / links / share + 3 * clock.START)


def test_the_step_is_the_sum_of_its_parts_in_every_case():
    cost = costs.cost(PROGRAM)
    found = clock.estimate(PROGRAM, cost, FACTS, UNITS)
    cycles = clock.work(PROGRAM, expert_axis=4, expert_rows=2048).cycles
    kernel = CHUNKS * 2 * 2048 * 64 * 32 * 19 / 16 / 4
    # (4096, 64) floats, gathered by 64 over six links; (256, 64) floats, reduced by 4 over the one
    # link of a ring in one direction.
    gathered = 12 * 4096 * 64 * 4 * 63 / 64 / 6
    reduced = 2 * 256 * 64 * 4 * 3 / 4
    rows = 3 * 1024 * 64 * 2 + 6 * 16 * 64 * 4 + 220
    for case, grouped, link in ((0, 0.85, 1.0), (1, 0.65, 0.9), (2, 0.5, 0.5)):
        collectives = (gathered + reduced) / link + 13 * clock.START
        assert found.cycles[case] == cycles and found.rows[case] == rows
        assert found.kernels[case] == pytest.approx(kernel / grouped)
        assert found.collectives[case] == pytest.approx(collectives)
        parts = cycles + kernel / grouped + rows + collectives
        assert found.step[case] == pytest.approx(parts)
    assert found.asynchronous == (0, 0, 0) and found.unknown == 1


def test_asynchronous_collectives_are_not_part_of_the_step():
    cost = costs.cost(PROGRAM)
    hidden = tuple(one._replace(asynchronous=True) for one in cost.collectives)
    visible = clock.estimate(PROGRAM, cost, FACTS, CUBE)
    found = clock.estimate(PROGRAM, cost._replace(collectives=hidden), FACTS, CUBE)
    assert found.asynchronous == visible.collectives and found.collectives == (0, 0, 0)
    assert found.step.likely == pytest.approx(visible.step.likely - visible.collectives.likely)


@pytest.mark.parametrize("topology, closed", [
    ("v5p:4x4x4", (True, True, True)),
    ("v5p:4x8x12", (True, True, True)),
    ("v5p:2x4x4", (False, False, False)),  # a cube closes all sides or none
    ("v5p:4x4", (False, False)),
    ("v5e:16x16", (True, True)),
    ("v5e:8x16", (False, True)),
    ("v6e:4x4", (False, False)),
])  # fmt: skip
def test_sides_that_are_rings(topology, closed):
    assert tuple(is_closed for _, is_closed in chips.sides_of(topology)) == closed
