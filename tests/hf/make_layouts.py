"""Writes tests/hf/layouts.json: how transformers names and shapes routers and gates, by family.

    pip install -e ".[hf]" && python -m tests.hf.make_layouts

For every model of `transformers_models.py`, in the form of its release and as it is in memory: the
names and shapes of router and gate, with {layer} and {expert} for numbers, the layers that have
them, the layout, the other tensors of such names, and what config.json says. A form is recorded
only after its coupling is found to be that of torch's own routers and experts.
"""

import json
import pathlib
import re
import tempfile

import transformers

from moe_erc.hf.inspect import open_moe
from moe_erc.hf.shards import find_tensors, read_json
from tests.hf import checkpoint, transformers_models
from tests.hf.layout_table import PATH, WORDS

TOLD = re.compile(
    "model_type|expert|moe|dense|sparse|layer|hidden_size|d_model|intermediate|ffn|predict|mtp|freq"
)
SIMILAR = re.compile("gate|router|expert|mlp|ffn|feed_forward|moe")


def record(model_type):
    model = transformers_models.build(model_type)
    forms = []
    for released in (True, False):
        with tempfile.TemporaryDirectory() as directory:
            directory = pathlib.Path(directory)
            model.float().save_pretrained(directory, save_original_format=released)
            moe = open_moe(directory)
            checkpoint.assert_coupling(moe, transformers_models.couplings(model))
            form = form_of(moe, find_tensors(directory))
            if form not in forms:
                forms.append(form)
            config = told(read_json(directory / "config.json"))
    return {"family": moe.family, "config": config, "forms": forms}


def form_of(moe, tensors):
    place = next(iter(moe._layers.values()))
    names = {(tensor.path, tensor.offset): name for name, tensor in tensors.items()}

    def parts_of(matrix):
        full = [names[part.path, part.offset] for part in matrix.parts]
        return {general(name): tensors[name].shape for name in full}

    own = {**parts_of(place.router), **parts_of(place.gates[0])}
    others = {general(name): tensor.shape for name, tensor in tensors.items()
              if SIMILAR.search(name) and re.search(r"(layers|blocks)\.\d", name)}  # fmt: skip
    return {
        "layers": moe.layers,
        "router": parts_of(place.router),
        "router_layout": WORDS[place.router.layout],
        "gate": parts_of(place.gates[0]),
        "gate_layout": WORDS[place.gates[0].layout],
        "others": {name: shape for name, shape in sorted(others.items()) if name not in own},
    }


def general(name):
    name = re.sub(r"\b(layers|blocks)\.\d+\.", r"\1.{layer}.", name, count=1)
    return re.sub(r"\bexperts\.\d+\.", "experts.{expert}.", name)


def told(config):
    """What config.json says in numbers, words and lists of them, and the same of nested ones."""
    kept = {}
    for name, value in config.items():
        if isinstance(value, dict) and name in ("text_config", "ffn_config"):
            kept[name] = told(value)
        elif not isinstance(value, dict) and value is not None and TOLD.search(name):
            kept[name] = value
    return kept


def main():
    transformers.logging.set_verbosity_error()
    lines = []
    for model_type in (*transformers_models.TEXT, *transformers_models.NESTED):
        lines.append(f"{json.dumps(model_type)}: {json.dumps(record(model_type))}")
    version = json.dumps(transformers.__version__)
    PATH.write_text(
        f'{{"transformers": {version}, "models": {{\n' + ",\n".join(lines) + "\n}}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
