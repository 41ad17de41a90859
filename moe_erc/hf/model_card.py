"""The README.md of an exported run: what was trained, how, on what, how far, and how to load it."""

from moe_erc.measures.validation import LOSS

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts, moe_erc]
---

# {name}

A Mixture-of-Experts language model of the OLMoE architecture, trained with moe_erc. It has {parameters:,} parameters,
of which a token meets {active:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Method

{router}

| loss | weight | options |
|---|---|---|
{losses}

The model was trained on their weighted sum. Nothing of them remains in the checkpoint but what they taught.

## Run

| | |
|---|---|
{run}
"""
ATTENTION = {  # of training and validation, by data.attend_across_documents
    True: "across the documents of a window",
    False: "within documents, with positions that restart at each",
}


def model_card(name, model, earlier, validation):
    """Markdown of a run: its name, ModelConfig, what its checkpoint says of it, and validation loss or None.

    earlier: `step`, `rows`, `config` (`configs/base.py`) and `history` of the run: {"from_step", "key", …} each.
    """
    config, step = earlier.config, earlier.step
    data, train = config["data"], config["train"]
    tokens = earlier.rows * data["sequence_length"]
    found = "not measured" if validation is None else f"{validation:.4f} {LOSS.unit}, mean over domains"
    run = {
        "step": f"{step:,}",
        "tokens": f"{tokens:,}, in batches of {train['batch_size']} x {data['sequence_length']}",
        LOSS.label: found,
        "data": ", ".join(data["sources"]),
        "attention": ATTENTION[data["attend_across_documents"]],
        "optimizer": "{name}, learning rate {learning_rate:g}, {schedule}".format(**config["optimizer"]),
        "started from": config["init_from"] or "random weights",
        "seed": config["seed"],
    }
    for change in earlier.history:
        run |= {f"{change['key']}, from step {change['from_step']} on": f"{change['after']}, {change['before']} before"}
    return CARD.format(
        name=name,
        parameters=model.parameters(),
        active=model.active_parameters(),
        router=model.router.describe(model),
        losses="\n".join(_loss(*loss) for loss in config["losses"].items() if loss[1]["weight"]),
        run="\n".join(f"| {what} | {value} |" for what, value in run.items()),
    )


def _loss(name, options):
    others = ", ".join(f"{key} {value}" for key, value in options.items() if key != "weight")
    return f"| {name} | {options['weight']:g} | {others} |"
