"""What a router is: a frozen record whose fields are its options.

The model, the step, the optimizer, the mesh and the export know this record alone. A router is one
file beside this one, one line in `routers/__init__.py` and, if it has options, a block
`routers.NAME` in `configs/base.py`.

`config` in every signature is the model's configuration (`model/config.py`): the sizes. The options
are `self`.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput, check_fields, within
from moe_erc.moe import parallel
from moe_erc.moe.routers.loss_free import balance_bias
from moe_erc.moe.routing import Routing, Scores, StepCounts, top


class Parameter(NamedTuple):
    """A parameter that a router adds to every layer. Axes and places are those of one layer."""

    initializer: Callable  # (key, shape) -> float32 array
    shape: tuple[int, ...]
    placement: P = P()  # every device has the whole array
    moments: P | None = None  # the place of its optimizer moments; None: that of the parameter
    # Whether Muon orthogonalises it, if it is a matrix. It should not where rows are compared with
    # tokens one by one: such rows are no hidden map.
    orthogonalized: bool = True


class RouterState(NamedTuple):
    """What routing carries from step to step beside its parameters; saved with the train state."""

    by_layer: dict  # what the layers read; every leaf has a leading axis of layers
    loss_scales: dict  # {name of a loss: factor of its weight}, float32 scalars


class Choice(NamedTuple):
    """Where the tokens of a layer go."""

    scores: Scores  # as losses and measures are to read them
    routing: Routing
    auxiliary: Any = None  # what a loss that is this router's own reads of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
    """How tokens choose experts.

    A subclass sets `name`, `parameters`, `score`, `choose`, `flops`, and says what it can do.
    BadInput for an option out of its range, which names it as `routers.NAME.option`.
    """

    name: ClassVar[str]
    # Scores become probabilities; the most probable experts are chosen and weighed by them.
    has_probabilities: ClassVar[bool] = False
    # Every expert has a direction in token space that attracts tokens: `rows`.
    has_rows: ClassVar[bool] = False
    # There is a parameter `router` (E, D), one row of the model's width per expert.
    is_linear: ClassVar[bool] = False
    # That parameter is used as an OLMoE uses it, so that training can start from one.
    is_softmax: ClassVar[bool] = False
    # Experts may compete during training; `Choice.auxiliary` is the result of the competition.
    competes: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self, f"routers.{self.name}")

    def key(self, option: str) -> str:
        """The configuration's key of an option."""
        return f"routers.{self.name}.{option}"

    def check(self, config: Any) -> None:  # noqa: B027  most routers work with any sizes
        """BadInput for sizes of the model that the router cannot work with."""

    @abc.abstractmethod
    def parameters(self, config: Any) -> dict[str, Parameter]:
        """By name, what the router adds to every layer."""

    @abc.abstractmethod
    def score(
        self, config: Any, mesh: Mesh | None, parameters: Mapping, x_BTD: jax.Array
    ) -> Scores:
        """What the router says of every token and expert.

        parameters: all of the layer's, the experts' included.
        """

    def preference(self, scores: Scores, state: Mapping) -> jax.Array:
        """(B, T, E): who is preferred. `state` is the layer's share of `RouterState.by_layer`."""
        return scores.probabilities_BTE

    @abc.abstractmethod
    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        """The experts of every token and their weights, token by token."""

    def route(
        self, config: Any, mesh: Mesh | None, scores: Scores, state: Mapping, run_all: Callable
    ) -> Choice:
        """The choice for a whole layer.

        run_all: takes an expert function of `experts.py` and gives (summed, kept) of all experts on
            every token.
        """
        choose = parallel.by_token(functools.partial(self.choose, config), mesh)
        return Choice(scores, choose(scores.probabilities_BTE, self.preference(scores, state)))

    def rows(self, config: Any, parameters: Mapping) -> jax.Array:
        """(E, D) of one layer: row i attracts tokens to expert i. BadInput without `has_rows`."""
        raise BadInput(f"model.router is {self.name!r}, which has no router rows")

    @abc.abstractmethod
    def flops(self, config: Any) -> float:
        """FLOPs of the forward pass per token and layer, beside those of the experts."""

    def gate_rank(self, config: Any) -> int:
        """The rank r of gates w_low @ w_high whose first factor is the router's; 0: whole gates."""
        return 0

    @property
    def weight_sum(self) -> float | None:
        """What the weights of every token sum to; None where tokens differ."""
        return None

    def most_experts(self, config: Any) -> int:
        """The most experts that a token can have."""
        return config.experts_per_token

    def init_state(self, config: Any) -> RouterState:
        """The state at step 0."""
        return RouterState({}, {})

    def before_step(self, config: Any, by_layer: dict, rng: jax.Array) -> dict:
        """What the layers read on a training step; at inference they read `by_layer` alone.

        rng: the key of the step. What is drawn is drawn from a key named after its use.
        """
        return by_layer

    def after_step(self, config: Any, state: RouterState, counts: StepCounts) -> RouterState:
        """The state for the next step, from the routing of the whole step."""
        return state

    def exports_as(self) -> "Router":
        """The softmax router that computes the same with `rows` as its parameter.

        BadInput, with the reason, if there is none.
        """
        raise BadInput(
            f"model.router: {self.name!r} cannot be exported; a softmax router has no such scores"
        )

    def describe(self, config: Any) -> str:
        """One sentence for the card of an exported model."""
        return f"Router: {self.name}, {config.experts} experts."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """Takes the K most probable experts and weighs them by their probability."""

    has_probabilities: ClassVar[bool] = True
    # Weights sum to 1 over the K chosen; False: the probabilities sum to 1 over all E.
    renormalize: bool = False

    @property
    def weight_sum(self) -> float | None:
        return 1.0 if self.renormalize else None

    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        return top(
            probabilities_BTE,
            preference_BTE,
            config.experts_per_token,
            renormalize=self.renormalize,
        )

    def describe(self, config: Any) -> str:
        return (
            f"Router: {self.name}, the top {config.experts_per_token} of {config.experts} experts."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasedTopK(TopK):
    """Top K that may balance without a loss (arXiv 2408.15664).

    A bias is added to the preferences, not to the weights. After each step it moves by `bias_rate`
    towards equal load: `loss_free.py`. The state of the router is then {"bias": (L, E)}.
    """

    bias_rate: float = within(least=0, default=0.0)

    def affinity(self, scores: Scores) -> jax.Array:
        """(B, T, E): what the bias is added to."""
        return scores.probabilities_BTE

    def preference(self, scores: Scores, state: Mapping) -> jax.Array:
        affinity_BTE = self.affinity(scores)
        return affinity_BTE + state["bias"] if "bias" in state else affinity_BTE

    def init_state(self, config: Any) -> RouterState:
        if not self.bias_rate:
            return RouterState({}, {})
        return RouterState({"bias": jnp.zeros((config.layers, config.experts))}, {})

    def after_step(self, config: Any, state: RouterState, counts: StepCounts) -> RouterState:
        if not self.bias_rate:
            return state
        bias_LE = balance_bias(state.by_layer["bias"], counts.assignments_LE, self.bias_rate)
        return RouterState({"bias": bias_LE}, state.loss_scales)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexibleTopK(BiasedTopK):
    """Top K that may keep fewer than K, or balance without a loss.

    top_p (arXiv 2403.07652): of the K, only the smallest prefix is kept whose probabilities sum to
        more.
    """

    top_p: float = within(above=0, most=1, note="1 keeps all K", default=1.0)

    def __post_init__(self):
        super().__post_init__()
        if self.bias_rate and self.top_p < 1:
            raise BadInput(
                f"{self.key('bias_rate')}: {self.bias_rate} beside top_p {self.top_p}: a prefix of "
                "the most probable experts is not one of the most preferred; use one of the two"
            )

    def choose(
        self, config: Any, probabilities_BTE: jax.Array, preference_BTE: jax.Array
    ) -> Routing:
        return top(
            probabilities_BTE,
            preference_BTE,
            config.experts_per_token,
            self.top_p,
            self.renormalize,
        )

    def check_plain(self) -> None:
        """BadInput for options that no OLMoE has."""
        if self.top_p < 1:
            raise BadInput(
                f"{self.key('top_p')}: {self.top_p} cannot be exported; "
                "an OLMoE has the same number of experts for every token"
            )
        if self.bias_rate:
            raise BadInput(
                f"{self.key('bias_rate')}: {self.bias_rate} cannot be exported; "
                "an OLMoE has no bias that turns the choice"
            )
