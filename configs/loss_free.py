"""Loss-free balancing (arXiv 2408.15664): a bias per expert changes the choice, not the weights.

    python train.py --config=configs/loss_free.py:tiny

Claim of the paper: better balance and perplexity than a balance loss, whose gradient disturbs the
language model's. The bias moves by 1e-3 a step towards equal load, outside the gradient; it is
saved with the run.
"""

from ml_collections import ConfigDict

from configs import vanilla


def get_config(size: str = "") -> ConfigDict:
    """A bias in place of the balance loss."""
    config = vanilla.get_config(size)
    config.routers.softmax.bias_rate = 1e-3
    config.losses.load_balance.weight = 0.0
    return config
