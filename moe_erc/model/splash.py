"""Causal attention by the splash kernels of jax, for TPUs, and whether they are right on one.

The kernels walk blocks of scores, which never leave the chip's own memory. Blocks ahead of all
their queries are skipped. On CPU the kernels are interpreted, slowly, for tests.
"""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.moe import self_test
from moe_erc.sharding import BATCH

# The most queries, or keys, of a block. Of twice as many the scores pass the 16 MiB that a kernel
# may use by default.
BLOCK = 1024
AT_ONCE = 512  # keys of a block that are multiplied at once
LANES = 128  # blocks are multiples of it
LOG = logging.getLogger(__name__)


def attend_by_splash(
    query_BTHD: jax.Array,
    key_BTGD: jax.Array,
    value_BTGD: jax.Array,
    segments_BT: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`attend` by splash attention; every device of `mesh` has its own sequences.

    Queries are scaled before they are multiplied, in their own dtype.
    """
    T = query_BTHD.shape[1]
    block = block_of(T)
    behind = -T % block
    # A query attends to nothing behind it, so what is padded changes no result.
    sides = ((0, 0), (0, behind), (0, 0), (0, 0))
    operands = {"query": query_BTHD * query_BTHD.shape[-1] ** -0.5}
    operands |= {"key": key_BTGD, "value": value_BTGD}
    by_head = {}
    for name, leaf in operands.items():
        by_head[name] = jnp.swapaxes(jnp.pad(leaf, sides), 1, 2)
    if segments_BT is not None:
        by_head["segments"] = jnp.pad(segments_BT.astype(jnp.int32), sides[:2], mode="edge")
    run = partial(_on_device, block)
    if mesh is not None:
        # The kernels do not pass the replication check. Nothing is summed over devices here.
        over_mesh = partial(jax.shard_map, mesh=mesh, in_specs=P(BATCH), out_specs=P(BATCH))
        run = over_mesh(run, check_vma=False)
    y_BHTD = run(by_head)
    return jnp.swapaxes(y_BHTD, 1, 2)[:, :T]


def uses_splash(implementation: str, platform: str, query_BTHD: jax.Array) -> bool:
    """Whether splash attention is called.

    It is where `implementation` is "splash". Under "auto" it is on a TPU, for bfloat16 queries that
    fill a block's lanes, unless it fails its self-test. BadInput if it was called by its name and
    fails.
    """
    length = query_BTHD.shape[1]
    width = query_BTHD.shape[3]
    suits = platform == "tpu" and query_BTHD.dtype == jnp.bfloat16 and length >= LANES
    if implementation != "splash" and not (implementation == "auto" and suits):
        return False
    refused = refusal(platform, width)
    if refused and implementation == "splash":
        raise BadInput(
            f"model.attention_implementation: 'splash' fails its self-test on {platform}: "
            f"{refused}; use 'auto'"
        )
    if refused:
        LOG.warning(
            "attention: splash fails its self-test on %s, slices are used instead: %s",
            platform,
            refused,
        )
    elif implementation == "auto":
        self_test.say_untimed("attention", "splash", platform)
    return not refused


def block_of(length: int) -> int:
    """Queries of a block: as few blocks as `BLOCK` allows, all of one size."""
    blocks = -(-length // BLOCK)
    lanes = -(-length // (blocks * LANES))
    return lanes * LANES


def _on_device(block, by_head):
    """(B, H, T, D) of the sequences of a device; blocks divide T."""

    def attend(interpret, by_head):
        kernel = _kernel(by_head["query"].shape[1:3], block, interpret)
        segments = by_head.get("segments")
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        return jax.vmap(kernel)(by_head["query"], by_head["key"], by_head["value"], ids)

    return lax.platform_dependent(
        by_head, cpu=partial(attend, True), default=partial(attend, False)
    )


def _kernel(heads_and_length, block, interpret):
    heads, length = heads_and_length
    at_once = AT_ONCE if block % AT_ONCE == 0 else block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_once,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_once,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


@cache
def refusal(platform: str, width: int) -> str | None:
    """Why splash attention must not be used on this process's devices; None if it may be.

    width: that of a head. The value and the gradients must be those of float32 softmax but for the
    rounding of bfloat16.
    """
    return self_test.ask(partial(_first_difference, width), platform)


def _first_difference(width, device):
    rng = np.random.default_rng(0)
    T = 2 * BLOCK - 3  # two of the largest blocks, the last of them padded
    of_queries = (1, T, 4, width)
    of_keys = (1, T, 2, width)
    operands = []
    for shape in (of_queries, of_keys, of_keys, of_queries):
        operands.append(rng.standard_normal(shape).astype(jnp.bfloat16))
    segments_BT = np.sort(rng.integers(3, size=(1, T)), axis=1)
    *inputs, dy_BTHD, segments_BT = jax.device_put((*operands, segments_BT), device)
    run = self_test.value_and_gradients(attend_by_splash)
    found = run(inputs, dy_BTHD, segments_BT=segments_BT)
    with jax.default_matmul_precision("highest"):
        run = self_test.value_and_gradients(_by_softmax)
        expected = run(inputs, dy_BTHD, segments_BT=segments_BT)
    names = ("value", "gradient of the queries", "gradient of the keys", "gradient of the values")
    return self_test.difference(names, found, expected)


def _by_softmax(query_BTHD, key_BTGD, value_BTGD, segments_BT):
    """By XLA's own operations, in float32."""
    of_float32 = [leaf.astype(jnp.float32) for leaf in (query_BTHD, key_BTGD, value_BTGD)]
    mask_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None]
    return jax.nn.dot_product_attention(
        *of_float32, mask=mask_B1TS, is_causal=True, implementation="xla"
    )
