"""Scoring throughput of `evaluation/scoring.py` and of the harness's backend for transformers.

    python -m benchmarks.scoring [--peer] [--json=FILE]

Both score the same random requests with an OLMoE of size `tiny`, random weights and float32. In
"sentences" a context has four continuations of some tokens; in "letters" it has four of one token.
Every subject has a process of its own, and they take turns (`benchmarks/__init__.py`). The time is
that from the token ids of all requests to their scores. Ours has the batch of the config, as in
eval.py. For the peer a trial chooses the batch and the implementation of experts.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import Subject, cores, environment, take_turns, timed
from configs import base

# Documents, answers to each, and the ranges (first, last) of the tokens of a context and an answer.
KINDS = {
    "sentences": (50, 4, (20, 120), (4, 32)),
    "letters": (50, 4, (60, 250), (1, 1)),
}
BATCHES = (8, 16, 32, 64)  # of the peer's trial, on a quarter of the requests
EXPERTS = ("eager", "grouped_mm")


def draw_requests(kind, vocabulary):
    """[(context, continuation)] token ids."""
    documents, answers, context_range, answer_range = KINDS[kind]
    rng = np.random.default_rng(0)

    def draw(first, last):
        return rng.integers(vocabulary, size=rng.integers(first, last + 1)).tolist()

    contexts = [draw(*context_range) for _ in range(documents)]
    requests = []
    for context in contexts:
        for _ in range(answers):
            requests.append((context, draw(*answer_range)))
    return requests


def build(kind):
    """(run, facts) of ours, for `benchmarks.Subject`."""
    import jax

    from moe_erc import sharding
    from moe_erc.evaluation.scoring import Scorer
    from moe_erc.model.config import ModelConfig
    from moe_erc.model.transformer import Transformer
    from moe_erc.training.state import init_weights

    config = base.get_config("tiny")
    model_config = ModelConfig.of(config)
    length = config.data.sequence_length
    sharding.use_cpu_cores()
    model = Transformer(model_config, sharding.fit_mesh(model_config))
    weights = jax.jit(functools.partial(init_weights, model))(jax.random.key(0))
    scorer = Scorer(model, (config.eval.batch_size, length))
    requests = draw_requests(kind, model_config.vocab_size)
    step = functools.partial(scorer.run, weights, requests)
    step()  # compiles
    return timed(step), {
        "settings": f"{config.eval.batch_size} x {length} tokens",
        "requests": len(requests),
    }


def build_peer(kind, threads):
    """(run, facts) of the harness's own backend; needs the extras `hf` and `eval`."""
    import tokenizers
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

    from benchmarks.peer import olmoe_config

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = base.get_config("tiny")
    network = OlmoeForCausalLM(olmoe_config(config.model, config.data.sequence_length)).eval()
    words = {f"<{token}>": token for token in range(config.model.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<0>")),
        eos_token="<0>",
    )
    backend = HFLM(pretrained=network, tokenizer=tokenizer, max_length=config.data.sequence_length)
    requests = [(("", ""), *request) for request in draw_requests(kind, config.model.vocab_size)]

    def step(share=1):
        backend._loglikelihood_tokens(requests[: len(requests) // share], disable_tqdm=True)

    def use(trial):
        experts, backend.batch_size_per_gpu = trial
        network.set_experts_implementation(experts)

    trials = {}
    for trial in [*itertools.product(EXPERTS, BATCHES)] * 2:
        use(trial)
        start = time.perf_counter()
        step(share=4)
        trials[trial] = min(time.perf_counter() - start, trials.get(trial, float("inf")))
    fastest = min(trials, key=trials.get)
    use(fastest)
    experts, batch = fastest
    facts = {
        "settings": f"{experts}, batches of {batch}",
        "requests": len(requests),
        "trials_s": {f"{experts}, {batch}": s for (experts, batch), s in trials.items()},
    }
    return timed(step), facts


def summarize(subjects, seconds):
    """The rows of the measurements, in plain values."""
    rows = []
    for (kind, maker), subject in subjects.items():
        rates = [subject.facts["requests"] / turn for turn in seconds[kind, maker]]
        figures = {
            "kind": kind,
            "maker": maker,
            "requests_per_s": statistics.median(rates),
            "requests_per_s_range": (min(rates), max(rates)),
        }
        rows.append(subject.facts | figures)
    speed = {(row["kind"], row["maker"]): row["requests_per_s"] for row in rows}
    for row in rows:
        peer = speed.get((row["kind"], "peer"))
        row["over_peer"] = row["requests_per_s"] / peer if peer else None
    return rows


def show(rows):
    table = Table("requests", "by", "settings", "requests/s", "min-max", "x peer")
    for row in rows:
        low, high = row["requests_per_s_range"]
        table.add_row(
            f"{row['requests']} {row['kind']}",
            row["maker"],
            row["settings"],
            f"{row['requests_per_s']:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            f"{row['over_peer']:.2f}" if row["over_peer"] else "",
        )
    Console(width=120).print(table)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help="the harness's own backend as well; needs the extras hf and eval",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, help="also write rows, versions and device here"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of every row")
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="times that a turn scores all requests; the median counts",
    )
    flags = parser.parse_args()
    subjects = {}
    for kind in KINDS:
        subjects[kind, "ours"] = Subject("benchmarks.scoring:build", kind=kind)
        if flags.peer:
            subjects[kind, "peer"] = Subject(
                "benchmarks.scoring:build_peer", kind=kind, threads=cores()
            )
    rows = summarize(subjects, take_turns(subjects, flags.rounds, flags.steps))
    for subject in subjects.values():
        subject.close()
    show(rows)
    if flags.json:
        found = {
            "benchmark": "scoring",
            "rounds": flags.rounds,
            "environment": environment(),
            "rows": rows,
        }
        flags.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
