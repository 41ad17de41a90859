"""Real clients answer with the text of the run: transformers, vLLM, llama.cpp, peft, trl, the Hub.

    pytest -m clients -n 0

No client is skipped: one that is missing fails its tests, and the summary names it. The summary
also has the table of docs/huggingface.md, with versions.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import base
from moe_erc import sharding
from moe_erc.data import bpe
from moe_erc.data.tokenizer import load as load_tokenizer
from moe_erc.export import write_olmoe
from moe_erc.hf.shards import read_config
from moe_erc.model.transformer import Transformer
from moe_erc.resume import Earlier
from moe_erc.runs import Run
from moe_erc.training.state import Weights
from tests.clients import environments
from tests.clients.environments import HUB, LLAMA_CPP, NEWEST, OLD, PEFT, TRL, VLLM
from tests.hf import models

pytestmark = pytest.mark.clients

# Heads of 32, the smallest that vLLM computes on a CPU.
SIZES = {"width": 128, "heads": 4, "kv_heads": 4, "expert_width": 64}
LENGTH = 128  # of the context
NEW_TOKENS = 12
PROMPTS = [
    "def main(",
    "the router sends every token",
    " don't  stop\n\n",
    "x = 3.14159",
    "漢字 and \U0001f600",
    "Ünïcödé ÿÿ",
    "\t\tif a <= b:",
    "experts",
    "1 2 3 4 5 6 7 8",
    "What it means?",
]
MODELS = {  # what differs from SIZES; "bpe" and "repeat" are of the export
    "as released": {},
    "norm_eps 1": {"norm_eps": 1.0},
    "tie_embeddings": {"tie_embeddings": True},
    "tie_embeddings, norm_eps 0.1": {"tie_embeddings": True, "norm_eps": 0.1},
    "rope_theta 500": {"rope_theta": 500.0},
    "router mpi": {"router": "mpi"},
    "renormalize": {"renormalize": True},
    "renormalize, all experts chosen": {"renormalize": True, "experts_per_token": 4},
    "clip_qkv 0.5": {"clip_qkv": 0.5},
    "kv_heads 2 of 4": {"kv_heads": 2},
    "kv_heads 2 of 4, --repeat_kv_heads": {"kv_heads": 2, "repeat": True},
    "BPE tokenizer": {"bpe": True},
}


def draw_params(model):
    """Random parameters, with which every part of the model changes the text."""
    shapes = models.abstract(model)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "norm" in name:
            values = rng.normal(1.0, 0.1, leaf.shape)
        elif name in ("embed", "head"):
            values = rng.normal(0.0, 1.0, leaf.shape)
        else:
            # Probabilities of the router stay away from 0 and 1.
            inputs = leaf.shape[-1] if name.endswith("router") else leaf.shape[-2]
            values = rng.normal(0.0, inputs**-0.5, leaf.shape)
        return jax.device_put(values.astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_run(model, spec, directory):
    """A Run of the model, as `open_run` gives it: with random parameters, and without its text."""
    config = base.get_config("debug").to_dict()
    config["data"] |= {"tokenizer": spec, "sequence_length": LENGTH}
    return Run(
        step=6,
        directory=epath.Path(directory),
        model=model,
        weights=Weights(draw_params(model), {}),
        tokenizer=load_tokenizer(spec),
        shape_BT=(len(PROMPTS), LENGTH),
        config=config,
        corpus=None,
        earlier=Earlier(step=6, rows=48, config=config),
    )


def greedy(run, prompts_ids, tokens):
    """The most probable continuations of `tokens` ids, each step computed from the whole text."""

    @jax.jit
    def logits_of(ids_BT):
        every_BT = jnp.ones_like(ids_BT, bool)
        output = run.model.apply({"params": run.weights.params}, ids_BT, every_BT, {})
        return (output.x_BTD @ output.head_VD.T)[..., :tokens]

    texts = [list(map(int, ids)) for ids in prompts_ids]
    rows = np.arange(len(texts))
    for _ in range(NEW_TOKENS):
        ids_BT = np.zeros((len(texts), LENGTH), np.int32)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)] = text
        last_B = np.array([len(text) - 1 for text in texts])
        best_B = np.asarray(logits_of(ids_BT))[rows, last_B].argmax(-1)
        for text, token in zip(texts, best_B.tolist(), strict=True):
            text.append(token)
    return [until_end(text[-NEW_TOKENS:], run.tokenizer.eos_id) for text in texts]


def until_end(ids, eos_id):
    """The ids before the end of the document."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


class Exported(types.SimpleNamespace):
    """directory, lines (of the command), rows, eos_id, prompt_ids, ids (of the run's model)."""


@pytest.fixture(scope="module")
def exported(model_config, tmp_path_factory):
    """{option: Exported}, written once."""
    directory = tmp_path_factory.mktemp("exports")
    words = [" ".join(PROMPTS)] * 3
    bpe.save(bpe.train(words, 300), directory / "bpe.json")
    found = {}
    for number, (option, changes) in enumerate(MODELS.items()):
        changes = SIZES | changes
        repeat = changes.pop("repeat", False)
        spec = str(directory / "bpe.json") if changes.pop("bpe", False) else "bytes"
        model = Transformer(model_config(**changes), sharding.make_mesh(1, 1))
        run = make_run(model, spec, directory / "run")
        place = directory / f"{number:02}"
        lines = write_olmoe(run, place, "apache-2.0", strict=False, repeat_kv_heads=repeat)
        rows = read_config(place)["vocab_size"]
        prompt_ids = [run.tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
        found[option] = Exported(
            directory=place,
            lines=lines,
            rows=rows,
            eos_id=run.tokenizer.eos_id,
            prompt_ids=prompt_ids,
            ids=greedy(run, prompt_ids, rows),
        )
    return found


@pytest.fixture(scope="module")
def asked(exported, tmp_path_factory):
    """Asks a client about all models, once; fails if it is not there."""
    answers = {}

    def ask(client, options=tuple(MODELS)):
        if client not in answers:
            why = environments.missing(client)
            models = {option: exported[option].directory for option in options}
            place = tmp_path_factory.mktemp("asked")
            answers[client] = why or environments.ask(client, models, PROMPTS, NEW_TOKENS, place)
        if isinstance(answers[client], str):
            pytest.fail(answers[client], pytrace=False)
        return answers[client]

    return ask


def test_the_texts_depend_on_every_option(exported):
    """Where a model had the text of another one, an engine that ignores an option would pass."""
    plain = exported["as released"].ids
    for option, changes in MODELS.items():
        if changes and option != "BPE tokenizer":
            same = sum(ids == other for ids, other in zip(exported[option].ids, plain, strict=True))
            assert same < len(PROMPTS) / 2, option
    assert all(len(set(ids)) > 1 for ids in plain)


@pytest.mark.parametrize("option", MODELS)
@pytest.mark.parametrize("client", [NEWEST, OLD, VLLM, LLAMA_CPP], ids=lambda client: client.name)
def test_greedy_text_is_that_of_the_run_or_what_the_export_says(
    exported, asked, client, option, record_property
):
    version, answers = asked(client)
    model = exported[option]
    answer = answers[option]
    agreeing = 0
    if "refused" not in answer:
        assert answer["prompt_ids"] == model.prompt_ids
        answer_ids = [until_end(ids, model.eos_id) for ids in answer["ids"]]
        agreeing = sum(ids == own for ids, own in zip(answer_ids, model.ids, strict=True))
        found = f"{agreeing} of {len(PROMPTS)}"
    else:
        found = "refused"
    record_property("client", (client.name, version, option, found))
    named = [line for line in model.lines if client.name in line]
    if not named:
        assert agreeing == len(PROMPTS), (answer, model.ids)
    elif "does not load" in named[0]:
        assert found == "refused"
    else:
        assert agreeing < len(PROMPTS) / 2


@pytest.mark.parametrize("client", [NEWEST, OLD], ids=lambda client: client.name)
@pytest.mark.parametrize("option", ["as released", "BPE tokenizer"])
def test_transformers_pads_batches_and_has_a_row_for_every_token(exported, asked, client, option):
    model = exported[option]
    answer = asked(client)[1][option]
    batched = [until_end(ids, model.eos_id) for ids in answer["batched_ids"]]
    assert batched == model.ids
    assert answer["rows"] == model.rows
    assert answer["decoded"] == PROMPTS


def test_peft_trains_a_lora(asked, record_property):
    version, answers = asked(PEFT, ("as released",))
    record_property("client", (PEFT.name, version, "", "LoRA step"))
    answer = answers["as released"]
    assert not answer.get("refused") and not answer["moved"]
    assert answer["losses"][1] < answer["losses"][0]


def test_trl_fine_tunes(asked, record_property):
    version, answers = asked(TRL, ("as released",))
    record_property("client", (TRL.name, version, "", "SFT step"))
    (loss,) = answers["as released"]["losses"]
    assert np.isfinite(loss) and loss > 0


def test_the_hub_reads_the_card(asked, record_property):
    version, answers = asked(HUB, ("renormalize", "kv_heads 2 of 4, --repeat_kv_heads"))
    record_property("client", (HUB.name, version, "", "card parsed"))
    data = answers["renormalize"]["data"]
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation" and "moe_erc" in data["tags"]
    assert "routers.softmax.renormalize True: vLLM and llama.cpp" in answers["renormalize"]["text"]
    repeated = answers["kv_heads 2 of 4, --repeat_kv_heads"]["text"]
    assert "2 key and value heads for 4 query heads" in repeated
