"""A run that is started again with another configuration or text: refused, or reported.

Nothing changes in silence.
"""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from configs import base, erc, vanilla
from moe_erc import resume
from moe_erc.checks import BadInput
from moe_erc.data import text
from moe_erc.training.checkpoint import Checkpoints
from moe_erc.training.identity import RULES, SCHEDULE, check_same_run, differences
from moe_erc.training.optimizer import OptimizerConfig, learning_rate_schedule
from tests import script, written

STEPS, BATCH, LENGTH = 6, 8, 32  # of :debug


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def arguments(text_directory, place):
    """Arguments of a run on the text in its own directory, with the cache beside it."""
    shutil.copytree(text_directory, place / "text")
    return [
        f"--config.data.sources=('{place / 'text'}',)",
        f"--config.data.cache_dir={place / 'cache'}",
        "--config.data.validation_fraction=0.1",
        "--config.eval.prompt=",
        "--config.log.tensorboard=False",
    ]


def start(name, arguments, place, environment=None):
    code, printed = script.run(name, arguments, place / "out", environment=environment)
    return code, printed, " ".join(printed.split())  # wrapped wherever a line was full


@pytest.fixture(scope="module")
def finished(arguments, place):
    """The workdir of an ERC run of 6 steps."""
    code, printed, _ = start(
        "train.py",
        ["--config=configs/erc.py:debug", *arguments, f"--workdir={place / 'run'}"],
        place,
    )
    assert code == 0, printed
    return place / "run"


@pytest.fixture
def going_on(arguments, place, finished, tmp_path):
    """Starts a copy of the finished run again, under a config with changes."""
    workdir = shutil.copytree(finished, tmp_path / "run")

    def go_on(*changes, config="erc", source="text", environment=None):
        given = [flag.replace(str(place / "text"), str(place / source)) for flag in arguments]
        flags = [f"--config=configs/{config}.py:debug", *given, f"--workdir={workdir}", *changes]
        return start("train.py", flags, tmp_path, environment)

    go_on.workdir = workdir
    return go_on


def metrics(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def read_meta(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.read_meta()


def keys(config, prefix=""):
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if hasattr(value, "items") else [prefix + name]


# ------------------------------------------------------------ which key may change


def test_every_block_has_a_rule_and_every_rule_a_key():
    config = base.get_config("debug")
    assert {name for name in config if name not in RULES} == set()
    blocks = {*config, *(f"losses.{name}" for name in config.losses), "data.planted", "data.tokens"}
    known = {*keys(config), *blocks}
    assert {name for name in RULES if name not in known} == set()
    assert set(SCHEDULE) == {
        "train.steps",
        *(f"optimizer.{name}" for name in ("learning_rate", "schedule", "warmup_steps")),
        *(f"optimizer.{name}" for name in ("decay_fraction", "final_fraction")),
    }


def test_options_of_a_loss_that_is_not_computed_make_no_difference():
    before, after = erc.get_config("debug").to_dict(), vanilla.get_config("debug").to_dict()
    after["losses"]["erc"]["alpha"] = 0.25
    assert differences(before, after) == [("losses.erc.weight", 1.0, 0.0)]
    with_alpha = erc.get_config("debug").to_dict()
    with_alpha["losses"]["erc"]["alpha"] = 0.25
    assert differences(before, with_alpha) == [("losses.erc.alpha", 1.0, 0.25)]
    # A loss of weight 0 that a later version has added is not a difference.
    later = erc.get_config("debug").to_dict()
    later["losses"]["later"] = {"weight": 0.0, "option": 3}
    filled = resume.read({"config": before, "data": {"tokenizer": "bytes"}}, 1, later).config
    assert check_same_run(filled, later) == []


def test_options_of_a_router_that_is_not_in_use_make_no_difference():
    before, after = erc.get_config("debug").to_dict(), erc.get_config("debug").to_dict()
    after["routers"]["mpi"]["scale"] = 8.0
    assert differences(before, after) == []
    after["routers"]["softmax"]["top_p"] = 0.5
    assert differences(before, after) == [("routers.softmax.top_p", 1.0, 0.5)]


@pytest.mark.parametrize("change, words", [
    (["--config.losses.erc.alpha=0.5"], ["losses.erc.alpha = 1.0", "0.5", "('losses',)"]),
    (["--config.losses.router_z.weight=0.1"], ["losses.router_z.weight = 0.0", "0.1"]),
    (["--config.routers.softmax.top_p=0.5"],
     ["routers.softmax.top_p = 1.0", "0.5", "('routers',)"]),
    (["--config.model.norm_eps=1e-3"], ["model.norm_eps", "0.001"]),
    (["--config.optimizer.b2=0.99"], ["optimizer.b2 = 0.95", "0.99", "('optimizer',)"]),
    (["--config.optimizer.weight_decay=0.0"], ["optimizer.weight_decay = 0.1"]),
    (["--config.optimizer.clip_norm=inf"], ["optimizer.clip_norm = 1.0", "inf"]),
    (["--config.optimizer.name=muon", "--config.resume.allow=('optimizer',)"],
     ["optimizer.name", "opt_state"]),
    (["--config.seed=1"], ["seed = 0", "('seed',)"]),
    (["--config.data.sequence_length=16"], ["data.sequence_length = 32", "16", "other windows"]),
    (["--config.data.weights=(2.0,)"], ["data.weights = []", "[1]"]),
    (["--config.model.experts=8", "--config.resume.allow=('model',)"],
     ["model.experts", "moe.router", "--workdir"]),
    (["--config.resume.allow=('loses',)"], ["resume.allow", "'loses'", "'losses'"]),
    (["--config.resume.allow=('losses.erk',)"], ["resume.allow", "'losses.erk'", "'losses.erc'"]),
    (["--config.losses.erc.alpha=0.5", "--config.resume.allow=('losses.erc.weight',)"],
     ["losses.erc.alpha"]),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_another_method_is_refused(change, words, going_on):
    code, printed, _ = going_on(
        "--config.train.steps=7", *change, environment={"JAX_LOG_COMPILES": True}
    )
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(word in last for word in words), printed
    assert (
        "from step" not in printed
        and "Compiling" not in printed
        and read_meta(going_on.workdir)["rows"] == STEPS * BATCH
    )


def test_a_name_in_allow_is_looked_up_in_a_new_run_too(arguments, tmp_path):
    flags = ["--config=configs/erc.py:debug", *arguments, f"--workdir={tmp_path / 'new'}"]
    code, printed, _ = start("train.py", [*flags, "--config.resume.allow=('modle',)"], tmp_path)
    assert (
        code == 2
        and "'modle'" in printed.splitlines()[-1]
        and "'model'" in printed.splitlines()[-1]
    ), printed
    assert not (tmp_path / "new").exists()


def test_what_changes_no_number_is_changed_without_a_word(going_on):
    code, printed, said = going_on(
        "--config.train.steps=6",
        "--config.eval.every=5",
        "--config.log.every=2",
        "--config.checkpoint.keep=3",
        "--config.mesh.data=1",
        "--config.mesh.expert=1",
        "--config.losses.lm.chunk=8",
        "--config.model.remat=block",
        "--config.model.experts_implementation=dense",
    )
    assert code == 0 and "Validation" in printed, printed
    assert "from step" not in said and "train.steps:" not in said


# ------------------------------------------------------------ allowed: said, kept, and exact


def test_another_loss_and_batch_size_are_said_kept_and_go_on_with_the_next_row(going_on, tmp_path):
    code, printed, said = going_on(
        "--config.train.steps=9",
        "--config.train.batch_size=4",
        "--config.model.dtype=bfloat16",
        "--config.resume.allow=('losses',)",
        config="vanilla",
    )
    assert code == 0, printed
    lines = [line for line in printed.splitlines() if line.startswith("from step 7 on: ")]
    assert len(lines) == 2, printed
    assert all(
        words in lines[0]
        for words in (
            "losses.erc.weight 1.0 -> 0.0",
            "train.batch_size 8 -> 4",
            "model.dtype float32 -> bfloat16",
            "behind the 48 rows",
            "schedule by steps",
        )
    )
    assert list(metrics(going_on.workdir, "loss/erc")) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(going_on.workdir, "loss/lm")) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    meta = read_meta(going_on.workdir)
    assert meta["rows"] == 6 * 8 + 3 * 4
    change = {"from_step": 7, "key": "losses.erc.weight", "before": 1.0, "after": 0.0}
    assert change in meta["history"] and len(meta["history"]) == 4

    # The change stays part of the run, and evaluation reports it.
    code, printed, said = start("eval.py", [f"--workdir={going_on.workdir}"], tmp_path)
    assert code == 0 and "from step 7 on: losses.erc.weight 1.0 -> 0.0" in said, printed
    for name in ("eval.json", "report.json"):
        report = json.loads((going_on.workdir / name).read_text())
        assert (
            report["step"] == 9 and "from step 7 on: train.batch_size 8 -> 4" in report["history"]
        )
    code, printed, said = going_on(
        "--config.train.steps=10",
        "--config.train.batch_size=4",
        "--config.model.dtype=bfloat16",
        config="vanilla",
    )
    assert code == 0 and "losses.erc.weight" not in said, printed
    meta = read_meta(going_on.workdir)
    assert meta["rows"] == 64 and change in meta["history"]


def test_a_step_after_another_batch_size_reads_the_next_rows_and_so_do_its_last_words(
    going_on, place
):
    # 48 rows were read in batches of 8. Steps of 5 rows go on with row 48, 53, …, until a number is
    # not finite. No step may be skipped, so the run stops and keeps its last good checkpoint.
    code, printed, _ = going_on(
        "--config.train.steps=40",
        "--config.train.batch_size=5",
        "--config.eval.batch_size=5",
        "--config.mesh.data=1",
        "--config.mesh.expert=1",
        "--config.optimizer.learning_rate=1e8",
        "--config.eval.every=1000",
        "--config.checkpoint.every=1",
    )
    last = printed.splitlines()[-1]
    assert code == 3 and "not finite" in last and "step" in last, printed
    assert "the step was skipped" not in printed, printed
    with Checkpoints(going_on.workdir / "checkpoints") as checkpoints:
        kept = checkpoints.latest_step()
    assert kept > STEPS and last.endswith(f"the last good checkpoint is of step {kept}"), printed
    lines = written.metrics(going_on.workdir)
    counted = [line for line in lines if line.get("guard/skipped_in_a_row") == 0]
    assert counted and all(value is not None for line in counted for value in line.values())
    (path,) = going_on.workdir.glob("batch-*.npz")
    step = int(path.stem.removeprefix("batch-"))
    assert step > STEPS + 1  # the bad batch is not the first of the other size
    data = base.get_config("debug").data.to_dict()
    data |= {
        "sources": (str(place / "text"),),
        "cache_dir": str(place / "cache"),
        "validation_fraction": 0.1,
    }
    corpus = text.prepare(text.DataConfig(**data))
    rows = text.train_batches(corpus, LENGTH, 1, 0)
    first = STEPS * BATCH + (step - STEPS - 1) * 5
    expected = [batch["inputs_BT"][0] for batch in itertools.islice(rows, first, first + 5)]
    np.testing.assert_array_equal(np.load(path)["inputs_BT"], expected)


def test_an_extended_run_says_what_becomes_of_the_learning_rate_and_logs_it(going_on):
    code, printed, _ = going_on("--config.train.steps=12", "--config.checkpoint.every=100")
    assert code == 0, printed
    # The cosine of 6 steps, 2 of them warm-up, ends at 0.1 of the peak. That of 12 steps is at 0.69
    # after 6.
    (line,) = [line for line in printed.splitlines() if line.startswith("from step 7 on: ")]
    for words in (
        "train.steps 6 -> 12",
        "(0.69 of the peak)",
        "(0.10 of the peak)",
        "(0.23 of the peak)",
        "wsd",
    ):
        assert words in line, line
    found = metrics(going_on.workdir, "optimizer/learning_rate")
    optimizer = OptimizerConfig(**erc.get_config("debug").optimizer)
    schedules = [learning_rate_schedule(optimizer, steps) for steps in (6, 12)]
    expected = {step: float(schedules[step > STEPS](step - 1)) for step in range(1, 13)}
    assert found == pytest.approx(expected, rel=1e-6)  # float32, by two programs


def test_a_wsd_run_that_is_extended_before_it_decays_keeps_its_rate():
    config = base.get_config("debug").to_dict()
    config["optimizer"] |= {"schedule": "wsd", "decay_fraction": 0.25}
    earlier = resume.read(
        {"config": config | {"train": config["train"] | {"steps": 8}}, "data": {"tokenizer": ""}}, 6
    )
    rates = [
        resume._rates(config | {"train": config["train"] | {"steps": steps}})(6)
        for steps in (8, 16)
    ]
    assert earlier.rows == 48 and rates == ["0.003 (1.00 of the peak)"] * 2


def test_fewer_steps_than_are_done_are_said_in_one_line(going_on):
    code, printed, _ = going_on("--config.train.steps=4")
    lines = [line for line in printed.splitlines() if "train.steps: 4" in line]
    assert code == 0 and len(lines) == 1 and "6" in lines[0] and "Validation" in printed, printed
    assert read_meta(going_on.workdir)["rows"] == STEPS * BATCH


# ------------------------------------------------------------ the text of a run


@pytest.fixture
def changeable(place, finished, text_directory, tmp_path):
    """The directory of the shared run's text and cache, which may be changed, moved and removed.

    After the test every file is as it was and in its place.
    """
    kept = shutil.copytree(place / "cache", tmp_path / "kept")
    yield place
    for name in ("text", "moved", "again", "cache"):
        shutil.rmtree(place / name, ignore_errors=True)
    shutil.copytree(text_directory, place / "text")
    shutil.copytree(kept, place / "cache")


def test_a_source_that_has_grown(going_on, changeable, tmp_path):
    source = changeable / "text"
    tokens = changeable / "cache" / "tokens"
    run = going_on.workdir
    before = json.loads((run / "report.json").read_text())
    (source / "new.txt").write_text("a document that came later " * 40)
    (source / "00.txt").write_text("another text in an old file " * 40)
    (source / "01.txt").unlink()
    grown = [
        "1 file added (new.txt)",
        "1 file removed (01.txt)",
        "1 file changed (00.txt)",
        "data.sources",
    ]

    # The text of the run is still in the cache: evaluation and training use it, and say so.
    code, printed, said = start("eval.py", [f"--workdir={run}"], tmp_path)
    assert code == 0 and all(words in said for words in grown), printed
    found = json.loads((run / "eval.json").read_text())
    validated = {
        key for key in before["measures"] if key.startswith(("validation", "bits_per_byte"))
    }
    assert len(validated) == 4 and all(
        found["measures"][key] == before["measures"][key] for key in validated
    )
    code, printed, said = going_on("--config.train.steps=7")
    assert code == 0 and all(words in said for words in [*grown, "goes on with the text"]), printed

    # The text is gone: the run is refused. The report of a finished run is still printed.
    shutil.rmtree(tokens)
    code, printed, said = going_on("--config.train.steps=8")
    last = printed.splitlines()[-1]
    assert code == 2 and all(words in last for words in [*grown, "('data',)", "--workdir"]), printed
    assert not tokens.exists()  # told before anything was tokenised
    code, printed, said = start("eval.py", [f"--workdir={run}"], tmp_path)
    assert code == 2 and all(words in printed.splitlines()[-1] for words in grown), printed
    code, printed, said = going_on("--config.train.steps=7")
    assert code == 0 and "Validation" in printed and "report.json" in said, printed
    code, printed, said = start("moe_erc.generate", [run, "the"], tmp_path)
    assert code == 0, printed  # which needs no text

    # The change is allowed: the run goes on with the other text, and its record says so.
    code, printed, said = going_on("--config.train.steps=8", "--config.resume.allow=('data',)")
    assert code == 0 and "from step 8 on: data.sources text " in said, printed
    history = read_meta(run)["history"]
    assert [change["key"] for change in history if change["from_step"] == 8] == [
        "train.steps",
        "data.sources",
    ]
    code, printed, said = start("eval.py", [f"--workdir={run}"], tmp_path)
    assert (
        code == 0 and "measured on other text" in said and "from step 8 on: data.sources" in said
    ), printed


def test_a_source_that_is_gone_or_somewhere_else(going_on, changeable):
    (changeable / "text").rename(changeable / "moved")
    code, printed, said = going_on("--config.train.steps=6")
    assert code == 0 and "it is no longer there" in said and "Validation" in printed, printed
    code, printed, said = going_on("--config.train.steps=7", source="moved")
    assert code == 0 and "data.sources" not in said, printed  # the same text at another place
    (changeable / "moved" / "new.txt").write_text("more text " * 40)
    (changeable / "moved").rename(changeable / "again")
    code, printed, said = going_on("--config.train.steps=8", source="again")
    last = printed.splitlines()[-1]
    assert code == 2, printed
    assert all(word in last for word in ("data.sources", "moved", "again", "other text")), printed


# ------------------------------------------------------------ earlier checkpoints, in this process


@pytest.fixture
def earlier_version(text_directory, tmp_path):
    """(config, meta) of a checkpoint that neither counts rows nor lists streams."""
    shutil.copytree(text_directory, tmp_path / "words")
    config = erc.get_config("debug")
    config.data.update(
        sources=(str(tmp_path / "words"),),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.1,
    )
    settings = config.to_dict()
    corpus = text.prepare(text.DataConfig(**settings["data"]))
    data = {"tokenizer": corpus.tokenizer.identity, "corpus": corpus.identity}
    old = json.loads(json.dumps(settings | {"resume": None}))
    del old["resume"]
    return settings, {"config": old, "data": data, "model": {}, "seed": 0}


def test_a_checkpoint_of_before_counts_its_rows_by_its_own_batch_size(earlier_version):
    settings, meta = earlier_version
    settings["train"] |= {"batch_size": 3}
    earlier = resume.compare(resume.read(meta, 5, settings), settings)
    assert [earlier.row_at(step, 3) for step in (5, 6, 9)] == [40, 43, 52]
    assert earlier.changes == (("train.batch_size", 8, 3),)


def test_a_checkpoint_of_before_knows_its_text_by_one_digest(earlier_version, tmp_path):
    settings, meta = earlier_version
    config = text.DataConfig(**settings["data"])
    earlier = resume.compare(resume.read(meta, 5, settings), settings)
    corpus, changes = resume.open_text(earlier, config)
    assert corpus.identity == meta["data"]["corpus"] and changes == []
    (tmp_path / "words" / "new.txt").write_text("more text " * 40)
    with pytest.raises(resume.TextGone, match=r"data\.sources: .*--workdir.*resume\.allow"):
        resume.open_text(earlier, config)
    corpus, (change,) = resume.open_text(earlier, config, ("data",))
    assert change.key == "data.sources" and corpus.identity != meta["data"]["corpus"]


def test_another_length_goes_on_behind_as_many_tokens(earlier_version):
    settings, meta = earlier_version
    settings["data"] |= {"sequence_length": 48}
    settings["resume"] = {"allow": ("data.sequence_length",)}
    earlier = resume.compare(resume.read(meta, 5, settings), settings)
    assert earlier.row_at(5, 8) == -(-5 * 8 * 32 // 48)
    config = dataclasses.replace(text.DataConfig(**settings["data"]), sequence_length=48)
    _, changes = resume.open_text(earlier, config, ("data.sequence_length",))
    assert changes == []  # the text is the same


def test_a_checkpoint_that_says_nothing_of_itself_is_refused():
    with pytest.raises(BadInput, match="step 3 is of another version of moe_erc"):
        resume.read({"step": 3}, 3)
