"""A study file is checked before anything is run: what is wrong with it is one line."""

import pathlib

import pytest

from moe_erc.checks import BadInput
from moe_erc.study import arms
from tests.study.conftest import AA

ROOT = pathlib.Path(__file__).parents[2]
STUDIES = [
    path
    for path in sorted((ROOT / "studies").glob("*.py"))
    if "get_study" in path.read_text("utf-8")
]


def test_the_control_has_more_runs_and_no_two_runs_have_one_seed(make_plan):
    alphas = "[('a', 1.0), ('b', 2.0), ('c', 3.0), ('d', 4.0), ('e', 5.0)]"
    three = (
        f"{{name: Arm('configs/erc.py:debug', {{'losses.erc.alpha': a}}) for name, a in {alphas}}}"
    )
    plan = make_plan(arms=three, control="'a'", seeds="4", first_seed="100")
    counts = {arm: len([run for run in plan.runs if run.arm == arm]) for arm in plan.settings}
    assert counts == {"a": 8, "b": 4, "c": 4, "d": 4, "e": 4}  # sqrt(4) times 4
    seeds = [run.seed for run in plan.runs]
    assert len(set(seeds)) == len(seeds) == 24 and min(seeds) == 100
    # A study that is stopped half way has half of the runs of every arm.
    half = [run.arm for run in plan.runs[:12]]
    assert {arm: half.count(arm) for arm in plan.settings} == {
        "a": 4,
        "b": 2,
        "c": 2,
        "d": 2,
        "e": 2,
    }


def test_arms_are_whole_configurations(make_plan):
    plan = make_plan(arms="{'vanilla': Arm('configs/vanilla.py:debug', {'train.batch_size': 4}), "
                     "'erc': Arm('configs/erc.py:debug', {'losses.erc.alpha': 2})}")  # fmt: skip
    assert plan.settings["vanilla"].config.train.batch_size == 4
    assert plan.settings["vanilla"].tokens == 2 * 4 * 32
    assert plan.settings["erc"].values["losses.erc.alpha"] == 2.0
    assert "--config.losses.erc.alpha=2" in plan.settings["erc"].arguments
    assert "seed" not in plan.settings["erc"].values


def test_seeds_of_the_command_line_replace_those_of_the_study(write_study):
    plan = arms.open_plan(write_study(control_seeds="9"), seeds=3)
    assert [plan.study.runs_of(arm) for arm in plan.settings] == [3, 3]


@pytest.mark.parametrize("changes, words", [
    ({"control": "'vanila'"}, ["study.control: 'vanila'", "'vanilla'"]),
    ({"control": None}, ["fails", "line", "control"]),
    ({"arms": "{'vanilla': Arm('configs/vanilla.py:debug')}"}, ["study.arms", "too few"]),
    ({"arms": "{'vanilla': Arm('configs/vanilla.py:debug'), 'b': Arm('configs/vanilla.py:debug')}"},
     ["'vanilla' and 'b' have equal configs", "is_aa"]),
    ({"arms": "{'vanilla': Arm('configs/vanilla.py:debug'), 'b/c': Arm('configs/erc.py:debug')}"},
     ["'b/c'"]),
    ({"arms": "{'vanilla': Arm('configs/vanila.py:debug'), 'b': Arm('configs/erc.py')}"},
     ["vanilla.py"]),
    ({"overrides": "{'train.stepz': 3}"}, ["'train.stepz'", "'train.steps'"]),
    ({"overrides": "{'seed': 3}"}, ["'seed'"]),
    ({"overrides": "{'train.steps': 2.5}"}, ["train.steps", "2.5", "int"]),
    ({"overrides": "{**SHORT, 'train.steps': 0}"}, ["train.steps: 0"]),
    ({"overrides": "{**SHORT, 'data.planted.mixing': 2.0}"}, ["data.planted.mixing: 2.0"]),
    ({"outcome": "'validation'"}, ["'validation'", "family", "'validation/mean'"]),
    ({"outcome": "'router/max_lod'"}, ["'router/max_lod'", "no measure", "'router/max_load'"]),
    ({"outcome": "'weights/gate_norm'"}, ["'weights/gate_norm'", "neither"]),
    ({"also": "('nothing/here',)"}, ["study.also", "'nothing/here'"]),
    ({"evaluations": "3"}, ["study.evaluations: 3", "has 2", "at most 2"]),
    ({"margin": "0"}, ["study.margin: 0"]),
    ({"seeds": "1"}, ["study.seeds: 1"]),
    ({"is_aa": "True"}, ["differ", "A/A"]),
    ({"aa": "'nowhere'"}, ["nowhere.py"]),
])  # fmt: skip
def test_a_study_that_means_nothing_is_refused_in_one_line(write_study, changes, words):
    with pytest.raises(BadInput) as refusal:
        arms.open_plan(write_study(**changes))
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message


def test_a_file_without_a_study_is_refused(tmp_path):
    path = tmp_path / "none.py"
    for content, words in (
        ("", "get_study"),
        ("def get_study():\n    return 1 / 0\n", "line 2"),
        ("a =", "none.py"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(BadInput, match=words):
            arms.open_plan(path)
    with pytest.raises(BadInput, match="there is no file"):
        arms.open_plan(tmp_path / "other.py")


def test_the_aa_study_has_to_be_one_and_of_the_same_size(make_plan, write_study):
    write_study("equal", **AA)
    assert make_plan(aa="'equal'").aa.study.is_aa
    write_study("no_aa")
    write_study("longer", **AA, overrides="{**SHORT, 'train.steps': 4}")
    write_study("other", **AA, outcome="'router/max_load'")
    for name, words in (
        ("no_aa", "is no A/A"),
        ("longer", "train.steps"),
        ("other", "another outcome"),
    ):
        with pytest.raises(BadInput, match=words):
            make_plan(aa=f"'{name}'")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_run(path):
    plan = arms.open_plan(path)
    assert plan.runs and plan.study.hypothesis.endswith(".")


def test_no_two_studies_share_a_run():
    """So that what one of them finds by chance says nothing of another one."""
    seen = {}
    for path in STUDIES:
        for run in arms.open_plan(path).runs:
            first = seen.setdefault((run.settings.digest, run.seed), path.stem)
            assert first == path.stem
