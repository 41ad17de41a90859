"""`moe_erc.export` makes an OLMoE of a run; train.py starts from its weights and tokenizer."""

import json
import random
import shutil

import pytest

from moe_erc.data import bpe
from moe_erc.hf.shards import find_tensors, read_config
from tests import script
from tests.tolerance import within


@pytest.fixture(scope="module")
def flags(text_directory, tmp_path_factory):
    return [
        "--config=configs/combinations/erc_mpi.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "--config.data.validation_fraction=0.1",
        "--config.eval.prompt=",
        # Those of an export: 256 bytes, the end of a document, and the token that is never met.
        "--config.model.vocab_size=258",
        "--config.log.tensorboard=False",
    ]


@pytest.fixture(scope="module")
def exported(flags, tmp_path_factory):
    """(workdir of a run, directory of its export)."""
    workdir = tmp_path_factory.mktemp("run")
    code, printed = script.run("train.py", [*flags, f"--workdir={workdir}"], workdir / "out")
    assert code == 0, printed
    directory = workdir / "export" / "olmoe"
    code, printed = script.run("moe_erc.export", [workdir, directory], workdir / "out")
    assert code == 0, printed
    return workdir, directory


def vanilla(flags):
    """The flags with the vanilla config: an exported model always has a softmax router."""
    return [flag.replace("combinations/erc_mpi", "vanilla") for flag in flags]


def refuses(words, flags, workdir, tmp_path):
    code, printed = script.run("train.py", [*flags, f"--workdir={workdir}"], tmp_path / "out")
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(str(word) in last for word in words), (
        printed
    )


def test_an_export_says_what_it_is(exported):
    workdir, directory = exported
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    config = read_config(directory)
    assert (config["eos_token_id"], config["max_position_embeddings"], config["dtype"]) == (
        256,
        32,
        "float32",
    )
    assert config["router_aux_loss_coef"] == 0.01 / 2 and config["rope_theta"] == 1e4
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert len(find_tensors(directory)) == 3 + 2 * (9 + 3 * 4)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["pad_token_id"] == 256 and "pad_token_id" not in config
    card = (directory / "README.md").read_text()
    loss = json.loads((workdir / "report.json").read_text())["measures"]["validation/mean"]
    for words in (
        "\nlicense: unknown\n",
        "# olmoe\n",
        "**model.kv_heads 1 for 2 heads: llama.cpp does not load",
        "(MPI)",
        "| erc | 1 |",
        "alpha 1.0",
        "| step | 6 |",
        f"{loss:.4f}",
        "1,536, in batches of 8",
        "| attention | across the documents of a window |",
    ):
        assert words in card, card


def test_an_export_is_evaluated_as_the_run_is(exported, tmp_path):
    workdir, directory = exported
    texts = []
    for place in (workdir, directory):
        arguments = [place, "the rou", "--new_tokens=12"]
        code, printed = script.run("moe_erc.generate", arguments, tmp_path / "out")
        assert code == 0, printed
        texts.append(printed[printed.index("the rou") :])
    assert texts[0] == texts[1] and len(texts[0]) > len("the rou\n")
    tasks = ["--tasks=alphabet_choice", "--task_dir=tests/evaluation/tasks", f"--output={tmp_path}"]
    code, printed = script.run("eval.py", [f"--checkpoint={directory}", *tasks], tmp_path / "out")
    assert code == 0 and " alphabet_choice " in printed, printed
    assert json.loads((tmp_path / "tasks.json").read_text())["step"] is None


def test_a_run_goes_on_from_an_export(flags, exported, tmp_path):
    workdir, directory = exported
    source = shutil.copytree(directory, tmp_path / "source")
    still = [
        "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.optimizer.learning_rate=1e-12",
    ]
    going_on = [
        *vanilla(flags),
        *still,
        f"--config.init_from={source}",
        f"--workdir={tmp_path / 'run'}",
    ]
    code, printed = script.run("train.py", going_on, tmp_path / "out")
    assert code == 0, printed
    reports = [
        json.loads((place / "report.json").read_text()) for place in (workdir, tmp_path / "run")
    ]
    before, after = (report["measures"] for report in reports)
    # Roundings: two layers with five sums over widths of at most 32 and attention over as many
    # tokens, the head, and the power step.
    terms = 2 * (5 * 32 + 32) + 32 + 48
    assert after["validation/mean"] == pytest.approx(before["validation/mean"], rel=within(terms))
    (source / "model.safetensors").unlink()  # a resumed run has its own weights
    code, printed = script.run("train.py", going_on, tmp_path / "out")
    assert code == 0 and "Validation" in printed, printed
    refuses(["init_from", source], [*vanilla(flags), *still], tmp_path / "run", tmp_path)


def test_what_a_run_cannot_go_on_from(flags, exported, tmp_path):
    _, directory = exported
    start = [*vanilla(flags), f"--config.init_from={directory}"]
    larger = [flag.replace(":debug", ":tiny") for flag in start]
    refuses(["model.layers", 4, 2], larger, tmp_path / "run", tmp_path)
    refuses(
        ["model.router", "'mpi'"],
        [*flags, f"--config.init_from={directory}"],
        tmp_path / "run",
        tmp_path,
    )
    refuses(
        ["/no/model"], [*vanilla(flags), "--config.init_from=/no/model"], tmp_path / "run", tmp_path
    )
    cut = shutil.copytree(directory, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:-1])
    refuses(
        ["model.safetensors", "bytes"],
        [*start, f"--config.init_from={cut}"],
        tmp_path / "run",
        tmp_path,
    )


def test_the_tokenizer_comes_with_the_model(flags, exported, tmp_path):
    pytest.importorskip("tokenizers")
    directory, draw = shutil.copytree(exported[1], tmp_path / "source"), random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(2000)]
    start = [*vanilla(flags), f"--config.init_from={directory}"]
    bpe.save(bpe.train(words, 600), directory / "tokenizer.json")
    refuses(["model.vocab_size", 258, 600], start, tmp_path / "run", tmp_path)
    (directory / "tokenizer.json").unlink()
    refuses(["tokenizer.json", "data.tokenizer"], start, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_export_is_refused(exported, tmp_path):
    workdir, directory = exported
    for arguments, words in (
        ([workdir, directory], [str(directory), "there already"]),
        (["/no/run", tmp_path / "new"], ["/no/run", "checkpoint"]),
        ([workdir], ["1 arguments", "RUN DIR"]),
        ([workdir, "gs://bucket/model"], ["gs://bucket/model", "local directory"]),
    ):
        code, printed = script.run("moe_erc.export", arguments, tmp_path / "out")
        assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed


def test_a_model_that_an_engine_would_serve_differently_is_named_and_under_strict_refused(
    exported, tmp_path
):
    workdir, _ = exported
    named = "model.kv_heads 1 for 2 heads: llama.cpp does not load"
    for option, code, words in (
        ("--strict", 2, [f"error: {named}", "without --strict"]),
        ("--license=Apache 2", 2, ["--license='Apache 2'", "apache-2.0"]),
        ("--license=mit", 0, [named, "step 6 is in"]),
        ("--repeat_kv_heads", 0, ["step 6 is in"]),
    ):
        directory = tmp_path / option
        found, printed = script.run(
            "moe_erc.export", [workdir, directory, option], tmp_path / "out"
        )
        assert found == code and all(word in printed for word in words), printed
        assert directory.exists() == (code == 0)
    assert named not in printed
    assert read_config(directory)["num_key_value_heads"] == 2
    assert "license: mit" in (tmp_path / "--license=mit" / "README.md").read_text()


def test_the_context_of_a_checkpoint_is_kept(flags, exported, tmp_path):
    source = shutil.copytree(exported[1], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    one_step = ["--config.train.steps=1", "--config.optimizer.warmup_steps=0"]
    start = [*vanilla(flags), f"--config.init_from={source}", *one_step]
    run = tmp_path / "run"
    code, printed = script.run("train.py", [*start, f"--workdir={run}"], tmp_path / "out")
    assert code == 0, printed
    code, printed = script.run("moe_erc.export", [run, tmp_path / "kept"], tmp_path / "out")
    assert code == 0 and read_config(tmp_path / "kept")["max_position_embeddings"] == 4096, printed
    shutil.rmtree(source)
    code, printed = script.run("moe_erc.export", [run, tmp_path / "gone"], tmp_path / "out")
    assert code == 0 and f"{source} is gone" in printed, printed
    assert read_config(tmp_path / "gone")["max_position_embeddings"] == 32


def test_two_processes_export_the_same_bytes(exported, tmp_path):
    workdir, directory = exported
    arguments = [workdir, tmp_path / "both"]
    codes = script.join(script.start_many(2, "moe_erc.export", arguments, tmp_path), 300)
    assert codes == [0, 0], (tmp_path / "out0").read_text() + (tmp_path / "out1").read_text()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "both" / name).read_bytes() == (directory / name).read_bytes()
