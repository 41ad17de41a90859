"""Manifold power iteration (MPI, arXiv 2606.12397): the gates turn the router's rows.

Each row takes one power step towards the gate of its own expert.

    python train.py --config=configs/mpi.py:tiny

Claim of the paper: +1.3 points at 1B and +1.8 to +2.3 at 3B to 11B, for 0.2 % of the throughput,
and better balance. Alignment with the top singular direction is 0.62 to 0.70, against 0.22 to 0.37.

The parameters are vanilla's. Exported with the turned rows (`moe_erc/model/export.py`), the model
is an ordinary MoE.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """Rows turned by the gates; C' is 4."""
    config = vanilla.get_config(size)
    config.model.router = "mpi"
    return config
