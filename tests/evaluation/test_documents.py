"""A run whose attention stays within documents is measured so: by each document of a validation window alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.data.text import DataConfig, prepare, validation_batches
from moe_erc.diagnosis.in_training import Diagnosis
from moe_erc.evaluation.expert_use import ExpertUse
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.losses.language_model import token_losses
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights

LENGTH = 32
TOLERANCE = 1e-4  # relative: a float32 sum over at most 2^10 tokens in another order, 2^10 x 2^-24


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same text with attention within documents and across them."""
    directory, rng = tmp_path_factory.mktemp("lines"), np.random.default_rng(0)
    texts = (f"{number} " + " ".join(rng.choice(["a", "the", "router"], rng.integers(5))) for number in range(600))
    (directory / "lines.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    of = (str(directory),), (), "bytes", "text", 0.1, LENGTH, str(tmp_path_factory.mktemp("cache"))
    return [prepare(DataConfig(*of, attend_across_documents=across)) for across in (False, True)]


@pytest.fixture(scope="module")
def model_and_weights(model_config):
    config = model_config(init_std=0.3, experts_implementation="dense", experts_per_token=2)
    model = Transformer(config, sharding.make_mesh(1, 1))
    return model, init_weights(model, jax.random.key(0))


@pytest.fixture(scope="module")
def alone(corpora):
    """Every document, or part of one, of the validation windows in a row of its own, padded."""
    within, _ = corpora
    [domain] = within.streams["validation"]
    rows = []
    for batch in validation_batches(within, domain, LENGTH, 1):
        for number in range(batch["segments_BT"].max() + 1):
            of_BT = (batch["segments_BT"] == number) & batch["mask_BT"]
            if of_BT.any():
                rows.append((batch["inputs_BT"][of_BT], batch["targets_BT"][of_BT]))
    found = {name: np.zeros((len(rows), LENGTH), np.int32) for name in ("inputs_BT", "targets_BT")}
    found["mask_BT"] = np.zeros((len(rows), LENGTH), bool)
    for row, (inputs, targets) in enumerate(rows):
        found["inputs_BT"][row, : len(inputs)] = inputs
        found["targets_BT"][row, : len(inputs)] = targets
        found["mask_BT"][row, : len(inputs)] = True
    return found


def measured(model, corpus, weights):
    """(Perplexity, ExpertUse, Diagnosis) of a corpus."""
    put = functools.partial(sharding.put_whole_batch, model.mesh)
    perplexity = Perplexity(model, corpus, functools.partial(token_losses, chunk=16), put, (4, LENGTH))
    use = ExpertUse(model, corpus, put, (4, LENGTH)).count(weights)
    return perplexity.run(weights), use, Diagnosis(model, perplexity.probe(1)).run(weights)


@pytest.fixture(scope="module")
def found(corpora, model_and_weights):
    model, weights = model_and_weights
    return [measured(model, corpus, weights) for corpus in corpora]


@pytest.fixture(scope="module")
def by_hand(model_and_weights, alone):
    """Losses and experts of the tokens of documents alone, by the plain program."""
    model, weights = model_and_weights
    observed = model.clone(observers=(("experts", lambda layer: layer.routing.experts_BTK, ()),))

    @jax.jit
    def run(weights, batch):
        output = observed.apply({"params": weights.params}, batch["inputs_BT"], batch["mask_BT"], weights.router)
        log_BTV = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", output.x_BTD, output.head_VD))
        targets_BT1 = batch["targets_BT"][..., None]
        return -jnp.take_along_axis(log_BTV, targets_BT1, axis=-1)[..., 0], output.observed["experts"]

    losses_BT, experts_LBTK = jax.device_get(run(weights, alone))
    return losses_BT[alone["mask_BT"]], experts_LBTK[:, alone["mask_BT"]]


def test_the_loss_is_that_of_the_documents_alone(corpora, found, by_hand, alone):
    (within, _, _), (across, _, _) = found
    losses_N, _ = by_hand
    [stream] = corpora[0].streams["validation"].values()
    [domain] = corpora[0].streams["validation"]
    tokens = f"validation_tokens/{domain}"
    assert within[tokens] == across[tokens] == len(losses_N) == len(stream.tokens_N) - 1  # the same targets
    assert len(alone["mask_BT"]) > stream.documents > 30
    loss = within[f"validation/{domain}"]
    assert loss == pytest.approx(losses_N.mean(), rel=TOLERANCE)
    assert abs(across[f"validation/{domain}"] - loss) > 10 * TOLERANCE * loss


def test_experts_met_are_those_of_the_documents_alone(found, by_hand):
    (_, within, _), (_, across, _) = found
    _, experts_LNK = by_hand
    counts_LE = np.stack([np.bincount(experts.ravel(), minlength=4) for experts in experts_LNK])
    # A token whose second and third expert are nearly as probable may choose otherwise: one of a thousand.
    assert np.abs(within["counts_LVE"].sum(axis=1) - counts_LE).max() <= 1
    assert np.abs(across["counts_LVE"].sum(axis=1) - counts_LE).max() > 10


def test_the_probe_keeps_to_documents(model_and_weights, corpora, found):
    model, weights = model_and_weights
    (_, _, within), (_, _, across) = found
    [domain] = corpora[0].streams["validation"]
    batch = next(validation_batches(corpora[0], domain, LENGTH, 8))
    rows = [(row, number) for row in range(8) for number in range(batch["segments_BT"][row].max() + 1)]
    alone = {name: np.zeros((len(rows), LENGTH), batch[name].dtype) for name in ("inputs_BT", "mask_BT")}
    for place, (row, number) in enumerate(rows):
        of_T = batch["segments_BT"][row] == number
        for name, array_BT in alone.items():
            array_BT[place, : of_T.sum()] = batch[name][row, of_T]
    expected = Diagnosis(model, sharding.put_whole_batch(model.mesh, alone)).run(weights)
    of = [measures["experts/output_cosine"] for measures in (within, expected, across)]
    np.testing.assert_allclose(of[0], of[1], rtol=0, atol=TOLERANCE)  # of cosines, which are at most 1
    assert np.abs(of[2] - of[1]).max() > 10 * TOLERANCE
