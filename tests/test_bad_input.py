"""Wrong input ends before any compilation, with one line that names it, code 2 and no files."""

import os

import pytest

from tests import script

SOURCE = "--config.data.sources=('{%s}',)"
OLMOE = script.ROOT / "tests" / "hf" / "olmoe" / "plain"  # a checkpoint without a tokenizer.json
TRAINING = [
    # unknown keys, wrong types, unknown words
    (["--config.model.widht=3"], ["config.model.widht", "config.model.width"]),
    (["--config.losses.erc.alfa=3"], ["config.losses.erc.alfa", "config.losses.erc.alpha"]),
    (["--config.model=3"], ["config.model", "config.model.width"]),
    (["--confg=configs/erc.py"], ["confg"]),
    (["stray"], ["'stray'", "--workdir=DIR"]),
    (["--config.model.width=wide"], ["config.model.width", "wide"]),
    (["--config.train.steps=1e3"], ["config.train.steps", "1e3"]),
    (["--config.model.tie_embeddings=maybe"], ["config.model.tie_embeddings", "maybe"]),
    (["--config.model.dtype=float8"], ["model.dtype", "float8", "bfloat16"]),
    (["--config.model.remat=all"], ["model.remat", "all", "block"]),
    (["--config.model.router=sotfmax"], ["model.router", "sotfmax", "softmax"]),
    (
        ["--config.model.attention_implementation=flash"],
        ["attention_implementation", "flash", "cudnn"],
    ),
    (
        ["--config.model.experts_implementation=fast"],
        ["experts_implementation", "fast", "block_loop"],
    ),
    (["--config.optimizer.name=adamx"], ["optimizer.name", "adamx", "adamw"]),
    (["--config.optimizer.schedule=sine"], ["optimizer.schedule", "sine", "cosine"]),
    (["--config.losses.erc.noise=gaussian"], ["losses.erc", "noise", "gaussian"]),
    (["--config.losses.erc.activation=relu"], ["losses.erc", "activation", "relu", "gate"]),
    (["--config.losses.erc.layer_reduction=max"], ["losses.erc", "layer_reduction", "max", "mean"]),
    (
        ["--config.losses.load_balance.scope=epoch"],
        ["losses.load_balance", "scope", "epoch", "step"],
    ),
    (["--config.guard.nonfinite=ignore"], ["guard.nonfinite", "ignore", "stop"]),
    # ranges
    (["--config.seed=-1"], ["seed", "-1", "0"]),
    (["--config.seed=99999999999999999999"], ["seed", "99999999999999999999", "4294967295"]),
    (["--config.train.steps=0"], ["train.steps", "0", "1"]),
    (["--config.train.profile_step=-1"], ["train.profile_step", "-1"]),
    (["--config.train.batch_size=0"], ["train.batch_size", "0"]),
    (["--config.model.layers=0"], ["model.layers", "0", "1"]),
    (["--config.model.width=-32"], ["model.width", "-32"]),
    (["--config.model.experts=0"], ["model.experts", "0"]),
    (
        ["--config.model.router=xmoe", "--config.model.experts=3"],
        ["model.experts", "3", "xmoe", "at least 4"],
    ),
    (["--config.train.batch_size=67108864"], ["train.batch_size", "67108864", "33554431"]),
    (["--config.losses.erc.precision=exact"], ["losses.erc", "precision", "exact", "auto"]),
    (["--config.model.experts_per_token=0"], ["model.experts_per_token", "0"]),
    (["--config.model.scan_unroll=0"], ["model.scan_unroll", "0"]),
    (["--config.model.shared_experts=-1"], ["model.shared_experts", "-1"]),
    (["--config.routers.softmax.top_p=1.5"], ["routers.softmax.top_p", "1.5", "at most 1"]),
    (["--config.routers.softmax.bias_rate=-1.0"], ["routers.softmax.bias_rate", "-1.0"]),
    (["--config.routers.mpi.scale=0.0"], ["routers.mpi.scale", "0.0", "positive"]),
    (["--config.model.init_std=nan"], ["model.init_std", "nan", "positive"]),
    (["--config.model.rope_theta=0.0"], ["model.rope_theta", "0.0", "positive"]),
    (["--config.model.norm_eps=-1.0"], ["model.norm_eps", "-1.0", "positive"]),
    (["--config.model.clip_qkv=-1.0"], ["model.clip_qkv", "-1.0", "at least 0"]),
    (["--config.losses.erc.weight=-1.0"], ["losses.erc.weight", "-1.0"]),
    (["--config.losses.erc.weight=nan"], ["losses.erc.weight", "nan"]),
    (["--config.losses.erc.alpha=-1.0"], ["losses.erc", "alpha", "-1.0"]),
    (["--config.losses.lm.chunk=0"], ["losses.lm.chunk", "0", "1"]),
    (["--config.optimizer.learning_rate=nan"], ["optimizer.learning_rate", "nan", "positive"]),
    (["--config.optimizer.b1=1.5"], ["optimizer.b1", "1.5", "below 1"]),
    (["--config.optimizer.eps=0.0"], ["optimizer.eps", "0.0", "positive"]),
    (["--config.optimizer.clip_norm=0.0"], ["optimizer.clip_norm", "0.0", "inf"]),
    (["--config.optimizer.warmup_steps=6"], ["optimizer.warmup_steps", "6"]),
    (["--config.guard.window=1"], ["guard.window", "1", "2"]),
    (["--config.eval.every=0"], ["eval.every", "0", "1"]),
    (["--config.eval.windows=-3"], ["eval.windows", "-3"]),
    (["--config.eval.report_windows=-2"], ["eval.report_windows", "-2"]),
    (["--config.eval.temperature=-0.5"], ["temperature", "-0.5"]),
    (["--config.eval.sample_tokens=-1"], ["new_tokens", "-1"]),
    (["--config.checkpoint.keep=0"], ["checkpoint.keep", "0", "1"]),
    (["--config.log.every=-1"], ["log.every", "-1", "1"]),
    # blocks that contradict each other
    (["--config.model.experts_per_token=5"], ["model.experts_per_token", "5", "4"]),
    (["--config.model.heads=3"], ["model.width", "32", "3"]),
    (["--config.model.kv_heads=3"], ["model.kv_heads", "2", "3"]),
    (["--config.model.router=aoe"], ["losses.erc.weight", "1.0", "'aoe'"]),
    (["--config.routers.softmax.rank=8"], ["config.routers.softmax.rank"]),
    (
        [f"--config.routers.softmax.{option}" for option in ("bias_rate=0.001", "top_p=0.5")],
        ["routers.softmax.bias_rate", "top_p", "0.5"],
    ),
    (
        ["--config.train.batch_size=6", "--config.train.micro_batches=4"],
        ["train.batch_size", "6", "4"],
    ),
    (["--config.train.micro_batches=0"], ["train.micro_batches", "0"]),
    (["--config.eval.batch_size=0"], ["eval.batch_size", "0"]),
    # meshes
    (["--config.mesh.expert=5"], ["mesh", "5", "devices"]),
    (["--config.mesh.data=0"], ["mesh.data", "0", "divisors"]),
    (["--config.mesh.data=-1", "--config.mesh.expert=-1"], ["mesh.data", "-1", "one -1"]),
    # text
    (["--config.data.sources=()"], ["data.sources", "()", "at least one"]),
    (["--config.data.sources=('/no/such/place',)"], ["data.sources", "/no/such/place"]),
    (["--config.data.sources=('wiki41b/en',)"], ["wiki41b", "wiki40b"]),
    (["--config.data.sources=('mnist',)"], ["data.text_key", "mnist", "'text'"]),
    ([SOURCE % "empty"], ["{empty}", ".txt"]),
    ([SOURCE % "file"], ["{file}", "directory"]),
    ([SOURCE % "blank"], ["{blank}", "0 training tokens"]),
    ([SOURCE % "short"], ["{short}", "13 training tokens", "33"]),
    ([SOURCE % "no_text"], ["{no_text}", "0 training tokens"]),
    ([SOURCE % "picture"], ["{picture}", ".txt or .jsonl"]),
    ([SOURCE % "broken_lines"], ["data.jsonl:2", "JSON", "'text'"]),
    ([SOURCE % "no_key"], ["data.jsonl:1", "'text'", "data.text_key"]),
    ([SOURCE % "number"], ["data.jsonl:1", "string", "'text'"]),
    ([SOURCE % "tfds"], ["{tfds}", "dataset_info.json"]),
    (["--config.data.sources=('tokens:{empty}/*.npy',)"], ["data.sources", "{empty}/*.npy"]),
    (["--config.data.tokens.dtype=int8"], ["data.tokens.dtype", "int8", "uint16"]),
    (["--config.data.weights=(1.0,2.0)"], ["data.weights", "2 weights", "1 data.sources"]),
    (["--config.data.weights=(-1.0,)"], ["data.weights", "-1.0", "above 0"]),
    (["--config.data.validation_fraction=0.0"], ["data.validation_fraction", "raise"]),
    (["--config.data.validation_fraction=1.5"], ["data.validation_fraction", "1.5"]),
    (["--config.data.sequence_length=0"], ["data.sequence_length", "0"]),
    (["--config.data.sequence_length=100000"], ["data.sequence_length", "100000"]),
    # tokenizers, models, tasks
    (["--config.data.tokenizer=/no/tokenizer.json"], ["/no/tokenizer.json"]),
    (["--config.data.tokenizer={empty}"], ["{empty}", "tokenizer.json"]),
    (["--config.data.tokenizer={half_json}"], ["{half_json}"]),
    (["--config.model.vocab_size=256"], ["model.vocab_size", "256", "257"]),
    (["--config.init_from=/no"], ["/no", "tokenizer.json"]),
    (["--config.init_from={olmoe}"], ["{olmoe}", "tokenizer.json", "--config.data.tokenizer"]),
    (
        ["--config.eval.tasks=('sciq',)", "--config.eval.task_dir=/no/tasks"],
        ["task_dir", "/no/tasks"],
    ),
    # values of another kind, and sizes that devices do not hold
    (["--config.data.sources=3"], ["data.sources", "3", "quotes"]),
    (["--config.data.sources=(None,)"], ["data.sources", "None"]),
    (["--config.data.sources=('embedded',1)"], ["data.sources", "1", "quotes"]),
    (["--config.data.weights=('x',)"], ["data.weights", "'x'", "number"]),
    (["--config.data.weights=(True,)"], ["data.weights", "True"]),
    (["--config.data.weights=((),)"], ["data.weights", "()"]),
    (["--config.data.weights=(nan,)"], ["data.weights", "nan"]),
    (["--config.eval.tasks=(1,)"], ["tasks", "1", "quotes"]),
    (["--config.model.layers=9999999999"], ["model.layers", "9999999999", "2147483647"]),
    (["--config.model.experts=3000000000"], ["model.experts", "3000000000", "2147483647"]),
    (["--config.model.vocab_size=2147483648"], ["model.vocab_size", "2147483648"]),
    (["--config.train.steps=3000000000"], ["train.steps", "3000000000", "2147483647"]),
    (
        ["--config.eval.batch_size=100000000000000000000"],
        ["eval.batch_size", "100000000000000000000"],
    ),
    (["--config.mesh.data=-99999999999"], ["mesh.data", "-99999999999"]),
    (["--config.optimizer.eps=1e-320"], ["optimizer.eps", "float32"]),
    (["--config.model.norm_eps=1e308"], ["model.norm_eps", "1e+308", "float32"]),
    (["--config.losses.erc.alpha=1e-50"], ["losses.erc.alpha", "1e-50"]),
    (["--config.model.width="], ["config.model.width"]),
    (["--config.model.router="], ["model.router", "''", "softmax"]),
    (["--config.eval.sample_tokens=40000"], ["40000", "32768", "new_tokens"]),
    # work directories
    (["--workdir={file}"], ["{file}"]),
    (["--workdir=/proc/run"], ["/proc/run"]),
    (["--workdir=/tmp/no-such-\udcff/run"], ["no-such-", "UTF-8"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and directories, each wrong in one way, by name."""
    root, texts = tmp_path_factory.mktemp("wrong"), {
        "blank": {"a.txt": "", "b.txt": ""},
        "short": {"a.txt": "a short text"},
        "no_text": {"data.jsonl": '{"text": ""}\n{"text": ""}\n'},
        "picture": {"a.png": "PNG"},
        "broken_lines": {"data.jsonl": '{"text": "a"}\n{"text": \n'},
        "no_key": {"data.jsonl": '{"body": "a"}\n'},
        "number": {"data.jsonl": '{"text": 3}\n'},
        "tfds": {"dataset_info.json": "{"},
        "empty": {},
    }  # fmt: skip
    for name, files in texts.items():
        (root / name).mkdir()
        for file, text in files.items():
            (root / name / file).write_text(text)
    assert (OLMOE / "config.json").is_file() and not (OLMOE / "tokenizer.json").exists()
    (root / "file").write_text("")
    (root / "half_json").write_text('{"model": ')
    return {path.name: str(path) for path in root.iterdir()} | {"olmoe": str(OLMOE)}


@pytest.mark.parametrize("arguments, words", TRAINING, ids=lambda value: " ".join(value))
def test_training_refuses(arguments, words, places, text_directory, tmp_path):
    arguments, words = (
        [text.format(**places) if "{" in text else text for text in texts]
        for texts in (arguments, words)
    )
    defaults = {
        "--config": "configs/erc.py:debug",
        # The test's own arguments replace these: of two equal flags the library would take both.
        "--config.data.sources": f"('{text_directory}',)",
        "--config.data.validation_fraction": "0.1",
        "--config.data.cache_dir": tmp_path / "cache",
        "--workdir": tmp_path / "run",
    }
    given = {argument.partition("=")[0] for argument in arguments}
    arguments = [
        f"{name}={value}" for name, value in defaults.items() if name not in given
    ] + arguments
    code, printed = script.run(
        "train.py", arguments, tmp_path / "out", environment={"JAX_LOG_COMPILES": True}
    )
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(word in last for word in words), printed
    assert "Traceback" not in printed and "Compiling" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--config=configs/none.py"], ["configs/none.py"]),
    (["--config=configs/erc.py:huge"], ["huge", "debug, tiny"]),
])  # fmt: skip
def test_a_config_that_does_not_exist(arguments, words, tmp_path):
    code, printed = script.run(
        "train.py", [*arguments, f"--workdir={tmp_path / 'run'}"], tmp_path / "out"
    )
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed


@pytest.mark.parametrize("arguments, words", [
    ([], ["--workdir", "--checkpoint"]),
    (["--workdir=/no/run"], ["/no/run", "checkpoint"]),
    (["--workdir=/no/run", "--checkpoint=/no/model"], ["--workdir", "--checkpoint", "one of them"]),
    (["--checkpoint=/no/model"], ["/no/model", "--tasks"]),
    (["--checkpoint=/no/model", "--tasks=sciq", "--figures"], ["/no/model", "--figures"]),
    (["--workdir=/no/run", "--tasks=sciq", "--task_dir=/no/tasks"], ["task_dir", "/no/tasks"]),
    (["--workdir=a,b", "--tasks=sciq", "--output=c"], ["--output=c", "one workdir"]),
    (["--workdir="], ["--workdir", "--checkpoint"]),
    (["--workdir=/no/run", "--windows=-3"], ["windows", "-3"]),
    (["--workdir=/no/run", "--windows=many"], ["windows", "many"]),
    (["--workdir=/no/run", "--limit=1e3"], ["limit", "1e3"]),
    (["--workdir=/no/run", "--num_fewshot=-1"], ["num_fewshot", "-1"]),
    (["--workdir=/no/run", "--figurs"], ["figurs"]),
    (["--workdir=/no/run", "stray"], ["'stray'"]),
])  # fmt: skip
def test_evaluation_refuses(arguments, words, tmp_path):
    code, printed = script.run("eval.py", arguments, tmp_path / "out")
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed
    assert not os.path.exists("/no")


@pytest.mark.parametrize("arguments, words", [
    ([], ["0 arguments", "RUN|DIR PROMPT"]),
    (["/no/run"], ["1 arguments", "/no/run", "RUN|DIR PROMPT"]),
    (["/no/run", "def"], ["/no/run", "checkpoints", "config.json"]),
    (["gs:///run", "def"], ["gs:///run", "gs://bucket/path"]),
    ([OLMOE, "def"], [str(OLMOE), "tokenizer.json"]),
    (["/no/run", "def", "--temperature=-1"], ["temperature", "-1.0", "at least 0"]),
    (["/no/run", "def", "--top_k=99999999999"], ["top_k", "99999999999"]),
    (["/no/run", "def", "--top_p=nan"], ["top_p", "nan"]),
    (["/no/run", "def", "--seed=-1"], ["seed", "-1"]),
    (["/no/run", "def", "--new_tokens=0"], ["new_tokens", "0"]),
    (["/no/run", "def", "--tempreature=1"], ["tempreature"]),
])  # fmt: skip
def test_generation_refuses(arguments, words, tmp_path):
    code, printed = script.run("moe_erc.generate", arguments, tmp_path / "out")
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed
    assert not os.path.exists("/no")


@pytest.mark.parametrize("arguments, words", [
    ([], ["0 arguments", "DIR"]),
    (["/no/model"], ["/no/model", "checkpoints/", "config.json"]),
    (["tests", "configs"], ["2 arguments", "DIR"]),
    (["tests", "--output=README.md"], ["--output=README.md", "is a file"]),
    (["tests/hf/families/olmoe", "--coupling"], ["coupling"]),
    (["tests/hf/families/olmoe", "--family=a,b"], ["--family=a,b", "ROUTER,GATE,LAYOUT", "halves"]),
    ([""], ["''"]),
])  # fmt: skip
def test_diagnosis_refuses(arguments, words, tmp_path):
    code, printed = script.run("moe_erc.diagnose", arguments, tmp_path / "out")
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed
    assert not os.path.exists("/no") and not (script.ROOT / "diagnosis").exists()


def test_the_diagnosis_of_a_run_takes_no_family(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = [tmp_path / "run", "--family=a,b,gates"]
    code, printed = script.run("moe_erc.diagnose", arguments, tmp_path / "out")
    assert code == 2 and "--family=a,b,gates" in printed and "is a run" in printed, printed


def test_the_diagnosis_of_a_hugging_face_model(tmp_path):
    directory = script.ROOT / "tests" / "hf" / "families" / "olmoe"
    code, printed = script.run(
        "moe_erc.diagnose", [directory, f"--output={tmp_path / 'found'}"], tmp_path / "out"
    )
    assert code == 0 and "olmoe: " in printed and "layers are coupled" in printed, printed
    assert {path.name for path in (tmp_path / "found").iterdir()} == {
        "diagnosis.json",
        "diagnosis.md",
        "figures",
    }
