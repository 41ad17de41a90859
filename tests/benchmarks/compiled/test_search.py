"""The search over cuts, with results that are given in place of compiled programs."""

import pytest

from benchmarks.compiled import search
from benchmarks.compiled.search import FAILS, FITS, TOO_LARGE, Cut
from configs import erc
from moe_erc.model.config import ModelConfig


def fits(seconds=1.0):
    step = {"best": seconds / 2, "likely": seconds, "worst": 2 * seconds}
    estimate = {"step": step}
    return {"outcome": FITS, "estimate": estimate, "allocated": 2**30, "sent": 1e9, "seconds": 60}


def too_large():
    return {"outcome": TOO_LARGE, "why": "100 GiB of 95"}


def tried(measured, shapes=((64, 1),), numbers=(1, 2, 4)):
    """The cuts of a search in order, where `measured(cut)` is an outcome."""
    cuts = []

    def measure(cut):
        cuts.append(cut)
        return measured(cut)

    list(search.each(shapes, numbers, measure))
    return cuts


def model_of(size):
    return ModelConfig.of(erc.get_config(size))


@pytest.mark.parametrize("size, devices, expected", [
    ("olmoe_1b_7b", 64, [(64, 1), (32, 2), (16, 4), (8, 8)]),
    ("15b", 64, [(64, 1), (32, 2), (16, 4), (8, 8)]),
    # 384, the width of an expert, is not a multiple of 256.
    ("15b", 256, [(128, 2), (64, 4), (32, 8)]),
    ("3b", 48, [(48, 1), (24, 2), (12, 4), (6, 8)]),
    ("3b", 7, []),
])  # fmt: skip
def test_sensible_meshes(size, devices, expected):
    assert search.meshes(model_of(size), devices) == expected


def test_micro_batches_leave_whole_sequences():
    assert search.micro_batches(768, 64) == [1, 2, 3, 4, 6, 12]
    assert search.micro_batches(32, 64) == []


def test_there_are_no_more_micro_batches_than_memory_asks_for():
    def measured(cut):
        least = 2 if cut.remat == "block" else 4
        return fits() if cut.micro_batches >= least else too_large()

    assert tried(measured) == [
        Cut(64, 1, "block", 1),
        Cut(64, 1, "block", 2),
        # Without recomputation a step needs more memory: one micro-batch is not tried again.
        Cut(64, 1, "none", 2),
        Cut(64, 1, "none", 4),
    ]


def test_if_no_number_fits_layers_that_are_kept_are_not_tried():
    cuts = tried(lambda cut: too_large())
    assert cuts == [Cut(64, 1, "block", number) for number in (1, 2, 4)]


def test_a_cut_that_fails_does_not_end_the_search():
    def measured(cut):
        return {"outcome": FAILS, "why": "Check failed"} if cut.data == 64 else fits()

    cuts = tried(measured, shapes=[(64, 1), (32, 2)])
    assert cuts == [
        Cut(64, 1, "block", 1),
        Cut(64, 1, "none", 1),
        Cut(32, 2, "block", 1),
        Cut(32, 2, "none", 1),
    ]


def test_ranking():
    failed = {"outcome": FAILS, "why": ""}
    ranked = search.rank([too_large(), fits(2.0), failed, fits(1.0)])
    assert ranked == [fits(1.0), fits(2.0), too_large(), failed]


def test_a_killed_search_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "searches" / "kept.jsonl"
    first, second = Cut(64, 1, "block", 1), Cut(32, 2, "block", 1)
    search.Kept(path, "this").or_measured(first, lambda cut: fits(3.0))
    search.Kept(path, "another").or_measured(first, lambda cut: fits(4.0))
    with path.open("a") as file:
        file.write('{"key": "this", "cut": {"da')  # killed here
    kept = search.Kept(path, "this")

    def never(cut):
        raise AssertionError(f"{cut} is kept")

    assert kept.or_measured(first, never)["estimate"]["step"]["likely"] == 3.0
    assert kept.or_measured(second, lambda cut: too_large())["outcome"] == TOO_LARGE
    again = search.Kept(path, "this")
    assert again.or_measured(second, never)["why"] == "100 GiB of 95"
    assert again.found.keys() == {first, second}


def test_results_of_another_config_or_topology_are_not_taken():
    config = erc.get_config("debug")
    key = search.key(config, ["v5p:4x4x4", None])
    assert search.key(config, ["v5e:8x8", None]) != key
    config.mesh.data, config.train.micro_batches = 4, 2  # what a search varies itself
    assert search.key(config, ["v5p:4x4x4", None]) == key
    config.model.width = 64
    assert search.key(config, ["v5p:4x4x4", None]) != key


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a program in the place of `benchmarks.compile_ahead`."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body):
        (package / "compile_ahead.py").write_text(f"import json, os, sys\n{body}\n")

    return write


def test_a_step_is_compiled_apart_and_its_file_is_read(stand_in):
    step = fits(2.0)
    del step["outcome"]
    found = {"programs": {"step": step | {"memory": {}}}}
    stand_in(f"""
assert sys.argv[1:-1] == ["--topology=v5e:8x8", "--nosearch", "--noparameter_losses"]
with open(sys.argv[-1].removeprefix("--json="), "w") as file:
    json.dump({found!r}, file)
""")
    assert search.compile_apart(["--topology=v5e:8x8"]) == fits(2.0)


@pytest.mark.parametrize("body, outcome, why", [
    ("print('error: does not fit: 1 GiB', file=sys.stderr); sys.exit(1)", TOO_LARGE, "1 GiB"),
    ("raise ValueError('no kernel')", FAILS, "ValueError: no kernel"),
    ("print('F7 Check failed: x\\n@', file=sys.stderr); os.abort()", FAILS, "Check failed: x"),
    ("os._exit(3)", FAILS, "exit code 3"),
])  # fmt: skip
def test_what_a_process_ends_with(stand_in, body, outcome, why):
    stand_in(body)
    assert search.compile_apart([]) == {"outcome": outcome, "why": why}
