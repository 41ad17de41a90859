"""Do the hidden units of an expert lie together? A map of gate columns in the plane, by t-SNE (ERC paper, Figure 4)."""

import numpy as np

from moe_erc.checks import BadInput


def gate_map(w_gate_EDF, experts, perplexity, seed):
    """The F columns of each of these experts' gates as points (N, 2), and (N,) the expert that owns each.

    perplexity: how many neighbours a point is drawn to; fewer where there are not so many points.

    Raises:
      ValueError: for an expert that is not there, or without scikit-learn.
    """
    if unknown := [expert for expert in experts if not 0 <= expert < len(w_gate_EDF)]:
        raise BadInput(f"expert {unknown[0]} is not one of the {len(w_gate_EDF)} experts, 0 to {len(w_gate_EDF) - 1}")
    try:
        from sklearn.manifold import TSNE  # seconds of import
    except ImportError:
        raise BadInput('a map of gates needs scikit-learn: pip install -e ".[plot]"') from None
    columns_ND = np.concatenate([np.asarray(w_gate_EDF[expert], np.float32).T for expert in experts])
    owner_N = np.repeat(experts, w_gate_EDF.shape[-1])
    tsne = TSNE(init="pca", perplexity=min(perplexity, len(columns_ND) - 1), random_state=seed)
    return tsne.fit_transform(columns_ND), owner_N
