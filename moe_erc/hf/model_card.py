"""The README.md of an exported run: what was trained, how, on what, how far, and how to load it."""

from typing import Any

from moe_erc.hf.engines import differences
from moe_erc.hf.tokenizer_files import BYTES
from moe_erc.measures.validation import LOSS
from moe_erc.model.config import ModelConfig

CARD = """\
---
library_name: transformers
license: {license_id}
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts, moe_erc]
---

# {name}

A Mixture-of-Experts language model of the OLMoE architecture, trained with moe_erc. It has
{parameters:,} parameters, of which a token meets {active:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Other engines

{engines}

## Method

{router}

| loss | weight | options |
|---|---|---|
{losses}

The model was trained on their weighted sum. The checkpoint holds nothing of the losses themselves.

## Run

| | |
|---|---|
{run}
"""
PRE_TOKENIZER = (
    "The tokenizer is plain bytes. llama.cpp's converter knows tokenizers by a hash and refuses "
    'this one; its `get_vocab_base_pre` has to return "gpt-2".'
)
ATTENTION = {  # of training and validation, by data.attend_across_documents
    True: "across the documents of a window",
    False: "within documents, with positions that restart at each",
}


def model_card(
    name: str,
    model: ModelConfig,
    written: ModelConfig,
    earlier: Any,
    validation: float | None,
    license_id: str,
) -> str:
    """The card of a run in Markdown.

    Args:
      name: of the directory
      model: the configuration of the run's model
      written: that of the exported one, `engines.config_for_engines`
      earlier: `step`, `rows`, `config` (`configs/base.py`) and `history` of the run, as its
        checkpoint has them; an entry of `history` is {"from_step", "key", "before", "after"}
      validation: the mean validation loss, or None
      license_id: the key `license` of the Hub, such as "apache-2.0"
    """
    config = earlier.config
    step = earlier.step
    data = config["data"]
    train = config["train"]
    tokens = earlier.rows * data["sequence_length"]
    found = "not measured"
    if validation is not None:
        found = f"{validation:.4f} {LOSS.unit}, mean over domains"
    run = {
        "step": f"{step:,}",
        "tokens": f"{tokens:,}, in batches of {train['batch_size']} x {data['sequence_length']}",
        LOSS.label: found,
        "data": ", ".join(data["sources"]),
        "attention": ATTENTION[data["attend_across_documents"]],
        "optimizer": "{name}, learning rate {learning_rate:g}, {schedule}".format(
            **config["optimizer"]
        ),
        "started from": _origin(config),
        "seed": config["seed"],
    }
    for change in earlier.history:
        what = f"{change['key']}, from step {change['from_step']} on"
        run[what] = f"{change['after']}, {change['before']} before"
    losses = []
    for loss, options in config["losses"].items():
        if options["weight"]:
            losses.append(_loss(loss, options))
    return CARD.format(
        name=name,
        license_id=license_id,
        parameters=written.parameters(),
        active=written.active_parameters(),
        engines=_engines(model, written, config["data"]["tokenizer"]),
        router=model.router.describe(model),
        losses="\n".join(losses),
        run="\n".join(f"| {what} | {value} |" for what, value in run.items()),
    )


def _engines(model, written, tokenizer):
    """What other engines make of the model, one paragraph a subject."""
    found = []
    if model.norm_eps != written.norm_eps:
        found.append(
            f"The run had norm_eps {model.norm_eps:g}. It is folded into the weights, because vLLM "
            f"and llama.cpp compute with {written.norm_eps:g}."
        )
    if model.tie_embeddings:
        found.append(
            "The run had one matrix for embedding and head. Both are written, because vLLM and "
            "llama.cpp do not tie them; fine-tuning trains them apart."
        )
    if model.kv_heads != written.kv_heads:
        found.append(
            f"The run had {model.kv_heads} key and value heads for {model.heads} query heads. They "
            "are repeated for llama.cpp, and the cache of keys and values grows by the same factor."
        )
    differing = differences(written)
    for difference in differing:
        found.append(f"**{difference}.**")
    if not differing:
        found.append("transformers, vLLM and llama.cpp compute this model.")
    if tokenizer == BYTES:
        found.append(PRE_TOKENIZER)
    return "\n\n".join(found)


def _origin(config):
    upcycled = config["init_upcycled"]
    if upcycled["path"]:
        return f"copies of the dense model {upcycled['path']}, noise {upcycled['noise']:g}"
    return config["init_from"] or "random weights"


def _loss(name, options):
    others = ", ".join(f"{key} {value}" for key, value in options.items() if key != "weight")
    return f"| {name} | {options['weight']:g} | {others} |"
