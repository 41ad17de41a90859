"""What makes a run the same run: the blocks of its description that a checkpoint shares with who goes on from it."""

import json
from collections.abc import Mapping

from moe_erc.checks import BadInput


def check_same_run(meta: Mapping, expected: Mapping):
    """ValueError unless `meta` says of everything in `expected` the same; what else `meta` holds does not matter.

    Both are nested plain JSON, e.g. {"model": {"experts": 8}}; the first key that differs is named in full.
    """
    for key, ours in json.loads(json.dumps(expected)).items():
        _check_equal(key, meta.get(key, "absent"), ours)


def _check_equal(key, saved, ours):
    if isinstance(saved, Mapping) and isinstance(ours, Mapping):
        for name in ours | saved:
            _check_equal(f"{key}.{name}", saved.get(name, "absent"), ours.get(name, "absent"))
    elif saved != ours:
        raise BadInput(
            f"the checkpoint was made with {key} = {saved}, this run has {ours}: "
            f"use another --workdir or set {key} back"
        )
