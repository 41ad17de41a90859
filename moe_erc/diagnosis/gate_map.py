"""A map of gate columns in the plane, by t-SNE (ERC paper, Figure 4).

It shows whether the hidden units of an expert lie together.
"""

from collections.abc import Sequence

import numpy as np

from moe_erc.checks import BadInput


def gate_map(
    w_gate_EDF: np.ndarray, experts: Sequence[int], perplexity: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The gate columns of some experts as points.

    Args:
      w_gate_EDF: gates of one layer
      experts: the experts whose F columns each are drawn
      perplexity: how many neighbours a point is drawn to, at most the number of other points
      seed: of the layout

    Returns:
      points (N, 2), and (N,) the expert of each point

    Raises:
      BadInput: for an expert that does not exist, or without scikit-learn.
    """
    count = len(w_gate_EDF)
    unknown = [expert for expert in experts if not 0 <= expert < count]
    if unknown:
        raise BadInput(f"expert {unknown[0]} is not one of the {count} experts, 0 to {count - 1}")
    try:
        from sklearn.manifold import TSNE  # seconds of import
    except ImportError:
        raise BadInput('a map of gates needs scikit-learn: pip install -e ".[plot]"') from None
    columns = [np.asarray(w_gate_EDF[expert], np.float32).T for expert in experts]
    columns_ND = np.concatenate(columns)
    owner_N = np.repeat(experts, w_gate_EDF.shape[-1])
    tsne = TSNE(init="pca", perplexity=min(perplexity, len(columns_ND) - 1), random_state=seed)
    return tsne.fit_transform(columns_ND), owner_N
