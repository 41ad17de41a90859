"""Three identities of ERC: what its noise adds, what MPI leaves of it, and what alpha starts from.

With G_j = w_gate_j @ w_gate_j.T, |r_i| the length of router row i, and sigma_j the leading singular
value of w_gate_j:

    noise:   E M[i, j]^2 = r_i (G_j + bound[i]^2 / 3 diag(G_j)) r_i.T
    MPI:     rows C u_j, u_j the leading left singular vector of w_gate_j, give
             loss <= C / E^2 sum_ij relu(sigma_j - sigma_i) at alpha 1, without noise
    alpha:   entries of M drawn from Normal(mu, (s mu)^2) independently give, in expectation,
             loss = (E - 1) / E 2 mu ((1 - alpha) Phi(z) + s' phi(z)),
             s' = s sqrt(1 + alpha^2),   z = (1 - alpha) / s'
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from configs.sizes import MODELS
from moe_erc import coupling_matrix, coupling_penalty, erc_loss, noise_bound, perturb
from moe_erc.losses.responses import Proxies, Response, squared_responses
from moe_erc.moe.routers.mpi import MPI
from tests.tolerance import assert_close

E, D, F = 5, 8, 6
# Roundings of a loss: two sums, over D and F, a root, and the sum over pairs of experts.
TERMS = D + F + 4 + 2 * E**2
# A mean of fixed draws differs from its expectation by more than this many standard errors with a
# probability of 6e-5.
ERRORS = 4


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    router_ED = rng.normal(size=(E, D))
    w_gate_EDF = rng.normal(size=(E, D, F))
    return np.float32(router_ED), np.float32(w_gate_EDF)


def with_equal_rows(w_gate_EDF, length_E):
    """Gates whose D rows have one length each: diag(G_j) = length_j^2 I."""
    row_lengths = np.linalg.norm(w_gate_EDF, axis=2, keepdims=True)
    return w_gate_EDF / row_lengths * length_E[:, None, None]


def closed_form(router_ED, w_gate_EDF):
    """E M^2, (E, E) float64, as a quadratic form in Gram matrices."""
    router_ED = np.float64(router_ED)
    w_gate_EDF = np.float64(w_gate_EDF)
    gram_EDD = np.einsum("jdf,jcf->jdc", w_gate_EDF, w_gate_EDF)
    diagonal_EDD = gram_EDD * np.eye(router_ED.shape[1])
    share_E = bounds(router_ED) ** 2 / 3
    clean_EE = np.einsum("id,jdc,ic->ij", router_ED, gram_EDD, router_ED)
    added_EE = np.einsum("i,id,jdc,ic->ij", share_E, router_ED, diagonal_EDD, router_ED)
    return clean_EE + added_EE


def bounds(router_ED):
    return nearest(router_ED) / (2 * np.linalg.norm(router_ED, axis=1))


def nearest(router_ED):
    """The distance of every row to the nearest other row, (E,)."""
    distance_EE = np.linalg.norm(router_ED[:, None] - router_ED[None], axis=-1)
    np.fill_diagonal(distance_EE, np.inf)
    return distance_EE.min(axis=1)


def assert_is_mean(draws, expected, errors=ERRORS):
    """Asserts that a mean over the first axis is the expectation, within its standard error."""
    draws = np.float64(draws)
    standard_error = draws.std(axis=0, ddof=1) / len(draws) ** 0.5
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - expected), errors * standard_error)


# ------------------------------------------------------------------------------- what noise adds
def test_the_mean_square_over_draws_is_the_closed_form():
    router_ED, w_gate_EDF = random_params()

    def squared(key):
        return coupling_matrix(perturb(router_ED, key), w_gate_EDF) ** 2

    keys = jax.random.split(jax.random.key(0), 4_000)
    squares_NEE = jax.jit(jax.vmap(squared))(keys)
    # One more standard error than usual, since E^2 entries are compared.
    assert_is_mean(squares_NEE, closed_form(router_ED, w_gate_EDF), errors=ERRORS + 1)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_expected_noise_is_the_penalty_of_the_root_of_the_closed_form(alpha):
    router_ED, w_gate_EDF = random_params(1)
    M_EE = np.sqrt(closed_form(router_ED, w_gate_EDF))
    loss = erc_loss(
        {"router": router_ED, "w_gate": w_gate_EDF},
        None,
        alpha=alpha,
        noise="expected",
        precision="highest",
    )
    assert_close(loss, penalty(M_EE, alpha), TERMS, largest=M_EE.max())


def test_gate_rows_of_equal_length_raise_every_square_by_the_distance_to_the_nearest_row():
    # diag(G_j) = c_j I, so the square of M[i, j] rises by bound[i]^2 / 3 c_j |r_i|^2, which is
    # c_j / 12 times the squared distance of row i to the nearest row. Where all c_j are equal, it
    # is the same number for all experts of a row.
    router_ED, w_gate_EDF = random_params(2)
    length_E = np.float32([1.0, 1.0, 1.0, 2.0, 0.5])
    w_gate_EDF = with_equal_rows(w_gate_EDF, length_E)
    bound_E = np.asarray(noise_bound(router_ED))
    spread_ED = (bound_E[:, None] * router_ED) ** 2 / 3

    weights = {"w_gate": jnp.asarray(w_gate_EDF)[None]}

    def squares(row_ED, spread_ED=None):
        spread_LED = None if spread_ED is None else jnp.asarray(spread_ED)[None]
        proxies = Proxies(jnp.asarray(row_ED)[None], spread_LED)
        return squared_responses(Response("gate", "highest"), proxies, weights, "cpu")[0].T

    clean_EE = squares(router_ED)
    noisy_EE = squares(router_ED, spread_ED)
    added_EE = np.outer(nearest(np.float64(router_ED)) ** 2, length_E**2) / 12
    assert_close(noisy_EE - clean_EE, np.float32(added_EE), D + F, largest=np.max(noisy_EE))
    # The smallest rise is far above what rounding may hide.
    assert added_EE.min() > 100 * (D + F) * 2.0**-23 * np.max(noisy_EE)


def test_noise_then_activates_no_row_hinge_at_alpha_1_and_increases_none():
    # sqrt(a + d) - sqrt(b + d) has the sign of sqrt(a) - sqrt(b) and is no larger.
    router_ED, w_gate_EDF = random_params(3)
    w_gate_EDF = with_equal_rows(w_gate_EDF, np.ones(E, np.float32))
    clean_EE = np.sqrt(closed_form_without_noise(router_ED, w_gate_EDF))
    noisy_EE = np.sqrt(closed_form(router_ED, w_gate_EDF))
    clean_hinges_EE = clean_EE - np.diag(clean_EE)[:, None]
    noisy_hinges_EE = noisy_EE - np.diag(noisy_EE)[:, None]
    np.testing.assert_array_equal(noisy_hinges_EE > 0, clean_hinges_EE > 0)
    assert (np.abs(noisy_hinges_EE) <= np.abs(clean_hinges_EE)).all()
    assert (clean_hinges_EE > 0).any()


def test_where_rows_are_equally_far_apart_the_whole_loss_is_no_larger_with_expected_noise():
    # Orthogonal rows of one length: all entries of the squared matrix rise by one number, those of
    # a column too.
    rows_ED = np.linalg.qr(np.random.default_rng(4).normal(size=(D, D)))[0][:E]
    router_ED = np.float32(2 * rows_ED)
    w_gate_EDF = with_equal_rows(random_params(4)[1], np.ones(E, np.float32))
    params = {"router": router_ED, "w_gate": w_gate_EDF}

    def loss(noise, alpha):
        return float(erc_loss(params, None, alpha=alpha, noise=noise, precision="highest"))

    added_EE = closed_form(router_ED, w_gate_EDF) - closed_form_without_noise(router_ED, w_gate_EDF)
    # The distance is sqrt(2) lengths, the length is 2 and c is 1.
    assert_close(np.float32(added_EE), np.full((E, E), 8 / 12), D + F)
    assert 0 < loss("expected", 1.0) < loss("none", 1.0)
    # Below 1 the bar rises by less than what it is compared with.
    assert loss("expected", 0.4) > loss("none", 0.4) > 0


def closed_form_without_noise(router_ED, w_gate_EDF):
    response_EEF = np.einsum("id,jdf->ijf", np.float64(router_ED), np.float64(w_gate_EDF))
    return np.sum(response_EEF**2, axis=-1)


def penalty(M_EE, alpha):
    """Equation 3 in float64."""
    diagonal_E = np.diag(M_EE)
    rows_EE = np.maximum(M_EE - alpha * diagonal_E[:, None], 0)
    columns_EE = np.maximum(M_EE - alpha * diagonal_E[None, :], 0)
    others_EE = 1 - np.eye(len(M_EE))
    return np.sum(others_EE * (rows_EE + columns_EE)) / len(M_EE) ** 2


# ------------------------------------------------------------------------------ what MPI leaves
C = 1.5


def exact_mpi(w_gate_EDF):
    """(rows of length C, leading singular values (E,))."""
    left_EDF, sigma_EF, _ = np.linalg.svd(np.float64(w_gate_EDF), full_matrices=False)
    return np.float32(C * left_EDF[:, :, 0]), sigma_EF[:, 0]


def bound_of_loss(sigma_E):
    return C / len(sigma_E) ** 2 * np.maximum(sigma_E[None, :] - sigma_E[:, None], 0).sum()


def clean_loss(router_ED, w_gate_EDF, alpha=1.0):
    params = {"router": router_ED, "w_gate": w_gate_EDF}
    return float(erc_loss(params, None, alpha=alpha, noise="none", precision="highest"))


def column_hinges(router_ED, w_gate_EDF):
    M_EE = np.asarray(coupling_matrix(router_ED, w_gate_EDF))
    return np.maximum(M_EE - np.diag(M_EE)[None, :], 0)


@pytest.mark.parametrize("seed", range(4))
def test_exact_mpi_has_no_column_hinge_and_bounds_the_loss(seed):
    # M[i, j] = C |u_i w_j| <= C sigma_j = M[j, j].
    _, w_gate_EDF = random_params(seed)
    w_gate_EDF *= np.float32([0.5, 1, 1, 2, 4])[:, None, None]
    router_ED, sigma_E = exact_mpi(w_gate_EDF)
    M_EE = np.asarray(coupling_matrix(router_ED, w_gate_EDF))
    assert_close(np.diag(M_EE), C * sigma_E, D + F + 4)
    assert not column_hinges(router_ED, w_gate_EDF).any()
    assert 0 < clean_loss(router_ED, w_gate_EDF) < bound_of_loss(sigma_E)


def test_gates_of_one_leading_singular_value_leave_nothing_of_erc():
    _, w_gate_EDF = random_params(5)
    _, sigma_E = exact_mpi(w_gate_EDF)
    w_gate_EDF = np.float32(w_gate_EDF / sigma_E[:, None, None])
    router_ED, _ = exact_mpi(w_gate_EDF)
    assert clean_loss(router_ED, w_gate_EDF) == 0
    assert clean_loss(router_ED, w_gate_EDF, alpha=0.4) > 0.1
    # A router of the same length that is no MPI has something left.
    other_ED = np.roll(router_ED, 1, axis=0)
    assert clean_loss(other_ED, w_gate_EDF) > 0.1


def test_gates_of_one_leading_singular_vector_reach_the_bound():
    rng = np.random.default_rng(6)
    sigma_E = np.array([1.0, 2.0, 2.5, 3.0, 5.0])
    left_D = np.linalg.qr(rng.normal(size=(D, 1)))[0][:, 0]
    right_EF = rng.normal(size=(E, F))
    right_EF *= sigma_E[:, None] / np.linalg.norm(right_EF, axis=1, keepdims=True)
    w_gate_EDF = np.float32(left_D[None, :, None] * right_EF[:, None, :])
    router_ED, found_E = exact_mpi(w_gate_EDF)
    assert_close(np.float32(found_E), sigma_E, D + F)
    loss = np.float32(clean_loss(router_ED, w_gate_EDF))
    assert_close(loss, bound_of_loss(sigma_E), TERMS, largest=C * sigma_E.max())


def test_the_rows_of_the_mpi_router_lose_their_column_hinges_as_it_is_iterated():
    _, w_gate_EDF = random_params(7)
    router_ED = random_params(8)[0]
    router = MPI(scale=C * E**0.5)
    config = SimpleNamespace(experts=E)

    @jax.jit
    def turned(router_ED):
        return router.rows(config, {"router": router_ED, "w_gate": w_gate_EDF})

    assert column_hinges(router_ED, w_gate_EDF).any()
    # The error falls by the squared ratio of the two leading singular values at every step.
    sigma_EF = np.linalg.svd(np.float64(w_gate_EDF), compute_uv=False)
    assert (sigma_EF[:, 1] / sigma_EF[:, 0]).max() ** (2 * 200) < 2.0**-23
    for _ in range(200):
        router_ED = turned(router_ED)
    assert not column_hinges(router_ED, w_gate_EDF).any()
    own_E = np.diag(np.asarray(coupling_matrix(router_ED, w_gate_EDF)))
    assert_close(own_E, np.float32(C * sigma_EF[:, 0]), 2 * (D + F) + 8)


# ------------------------------------------------------------------------ what alpha starts from
ALPHAS = (0.4, 0.7, 1.0)


def loss_at_start(mu, s, alpha, experts):
    """The expected loss where entries of M are independent Normal(mu, (s mu)^2)."""
    spread = s * (1 + alpha**2) ** 0.5
    z = (1 - alpha) / spread
    hinge = mu * ((1 - alpha) * norm.cdf(z) + spread * norm.pdf(z))
    return 2 * hinge * (experts - 1) / experts


def penalties(M_NEE, alpha):
    return jax.jit(jax.vmap(coupling_penalty, in_axes=(0, None)))(jnp.float32(M_NEE), alpha)


@pytest.mark.parametrize("alpha", [*ALPHAS, 1.3])
def test_independent_normal_entries_have_the_loss_of_the_formula(alpha):
    mu, s, experts = 3.0, 0.1, 16
    M_NEE = mu * (1 + s * np.random.default_rng(0).normal(size=(1_000, experts, experts)))
    assert_is_mean(penalties(M_NEE, alpha), loss_at_start(mu, s, alpha, experts))


@pytest.fixture(scope="module")
def matrices_at_init():
    """M of 256 layers of size tiny as initialised, (N, E, E) by noise."""
    _, width, _, _, experts, _, expert_width, _ = MODELS["tiny"]
    initializer = jax.nn.initializers.truncated_normal(0.02, lower=-3.0, upper=3.0)

    def of_layer(key):
        router_key, gate_key, noise_key = jax.random.split(key, 3)
        router_ED = initializer(router_key, (experts, width))
        w_gate_EDF = initializer(gate_key, (experts, width, expert_width))
        proxy_ED = perturb(router_ED, noise_key)
        clean_EE = coupling_matrix(router_ED, w_gate_EDF)
        return {"none": clean_EE, "uniform": coupling_matrix(proxy_ED, w_gate_EDF)}

    keys_N = jax.random.split(jax.random.key(0), 256)
    of_layers = jax.jit(lambda keys_N: jax.lax.map(of_layer, keys_N))
    return jax.tree.map(np.float64, of_layers(keys_N))


def formula_at_init(M_NEE, alpha):
    """The formula with the spread that each hinge meets.

    A row hinge compares entries of one row. They share the length of the router row, so it meets
    the spread within rows. A column hinge compares entries of two rows and meets the whole spread.
    """
    mu = M_NEE.mean()
    whole = M_NEE.std() / mu
    within_rows = M_NEE.var(axis=2, ddof=1).mean() ** 0.5 / mu
    experts = M_NEE.shape[1]
    of_columns = loss_at_start(mu, whole, alpha, experts) / 2
    of_rows = loss_at_start(mu, within_rows, alpha, experts) / 2
    return of_rows + of_columns


@pytest.mark.parametrize("noise", ["none", "uniform"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_of_initialised_layers_is_that_of_the_formula(matrices_at_init, noise, alpha):
    M_NEE = matrices_at_init[noise]
    assert_is_mean(penalties(M_NEE, alpha), formula_at_init(M_NEE, alpha))


@pytest.mark.parametrize("noise", ["none", "uniform"])
def test_the_first_loss_at_alpha_0_4_is_eleven_times_that_at_1(matrices_at_init, noise):
    M_NEE = matrices_at_init[noise]
    low_N = np.float64(penalties(M_NEE, 0.4))
    high_N = np.float64(penalties(M_NEE, 1.0))
    ratio = formula_at_init(M_NEE, 0.4) / formula_at_init(M_NEE, 1.0)
    assert 10 < ratio < 12
    # mean(low) = ratio mean(high), whose difference has a standard error.
    assert_is_mean(low_N - ratio * high_N, 0.0)
