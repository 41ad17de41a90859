"""Expert-router coupling (ERC, arXiv 2512.23447) for Mixture-of-Experts language models in JAX.

Shapes live in names, in the letters of the einsum strings; scalars and configs carry none:

    B batch · T time · S slots of a cache · N rows (B T) · D width · H heads · V vocabulary
    L layers · E experts · K experts per token · F expert width

`x_BTD` is (batch, time, width), `router_ED` one row per expert, `w_gate_EDF` the gate matrix of
every expert.
"""

from moe_erc.losses.erc import coupling_matrix, coupling_penalty, erc_loss, noise_bound, perturb

__all__ = ["coupling_matrix", "coupling_penalty", "erc_loss", "noise_bound", "perturb"]
__version__ = "0.1.0"
