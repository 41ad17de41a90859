"""Programs lowered for CUDA, without a GPU, hold the kernels and nothing dense over experts."""

import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from moe_erc import sharding
from moe_erc.moe import grouped, parallel
from moe_erc.moe import pallas_matmul as kernels
from moe_erc.moe.experts import GATED, IMPLEMENTATIONS, weighed
from moe_erc.moe.pallas_matmul import pallas_matmul
from moe_erc.moe.routing import Routing

KERNEL = re.compile(r"custom_call @(?:__gpu\$xla\.gpu\.triton|triton_kernel_call\w*)\(")


def described_gpus(data, expert):
    """A mesh of GPUs that are only described, not present."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return sharding.make_mesh(data, expert).abstract_mesh.update(abstract_device=device)


def lowered_for_cuda(mesh, function, *arguments):
    """The text of the program that is lowered for CUDA."""
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def arrays(tokens, experts_per_token, experts, width, hidden):
    """x, routing and matrices of a layer, as shapes."""
    shape = jax.ShapeDtypeStruct
    up, down = (experts, width, hidden), (experts, hidden, width)
    matrices = {
        name: shape(of, jnp.bfloat16) for name, of in zip(GATED, (up, up, down), strict=True)
    }
    routing = Routing(*(shape((*tokens, experts_per_token), of) for of in (jnp.float32, jnp.int32)))
    return shape((*tokens, width), jnp.bfloat16), routing, matrices


def gradients(mesh):
    """Gradients of the layer's output by all its inputs."""

    def loss(x_BTD, weights_BTK, matrices, routing):
        run = partial(IMPLEMENTATIONS["pallas"], weighed)
        y_BTD, _ = parallel.apply(
            run, mesh, x_BTD, routing._replace(weights_BTK=weights_BTK), matrices
        )
        return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

    return lambda x_BTD, routing, matrices: jax.grad(loss, (0, 1, 2))(
        x_BTD, routing.weights_BTK, matrices, routing
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_value_and_gradients_are_three_kernels(dtype):
    def loss(x_MD, w_EDF, sizes_E):
        return jnp.sum(pallas_matmul(x_MD, w_EDF, sizes_E).astype(jnp.float32) ** 2)

    shapes = ((1000, 200), dtype), ((6, 200, 72), dtype), ((6,), jnp.int32)
    text = lowered_for_cuda(
        described_gpus(1, 1), jax.grad(loss, (0, 1)), *(jax.ShapeDtypeStruct(*of) for of in shapes)
    )
    assert len(KERNEL.findall(text)) == 3
    assert "stablehlo.dot_general" not in text


def test_no_array_of_the_layer_is_larger_than_a_chunk(monkeypatch):
    tokens, experts_per_token, experts, width, hidden = (4, 512), 8, 16, 64, 192
    monkeypatch.setattr(grouped, "CHUNK_BYTES", 1024 * hidden * 2)
    text = lowered_for_cuda(
        described_gpus(1, 1),
        gradients(None),
        *arrays(tokens, experts_per_token, experts, width, hidden),
    )
    # The forward pass has 3. The backward pass has 2 for the recomputed hidden rows, and 2 for each
    # of the three matmuls.
    assert len(KERNEL.findall(text)) == 3 + 2 + 6
    assert "stablehlo.dot_general" not in text
    sizes = [
        [int(size) for size in found[:-1].split("x")]
        for found in re.findall(r"tensor<((?:\d+x)+)(?:f32|bf16)>", text)
    ]
    # 16384 bfloat16 assignments are 16 chunks of 1024 rows.
    assert [1024, hidden] in sizes and [1024, width] in sizes
    largest_of_rows = max(rows * columns for rows, columns in (of for of in sizes if len(of) == 2))
    assert largest_of_rows == max(4 * 512 * width, 1024 * hidden)
    # An expansion of a chunk over experts would be E times as large.
    assert max(jnp.prod(jnp.array(of)) for of in sizes if len(of) > 2) == experts * width * hidden


def test_it_lowers_inside_a_mesh():
    mesh = described_gpus(2, 4)
    text = lowered_for_cuda(mesh, gradients(mesh), *arrays((16, 64), 2, 8, 32, 48))
    assert len(KERNEL.findall(text)) == 3 + 2 + 6
    assert "stablehlo.dot_general" not in text


@pytest.mark.parametrize(("capability", "columns"), [("9.0", 256), ("8.6", 128)])
def test_a_gpu_with_little_shared_memory_has_narrow_tiles(monkeypatch, capability, columns):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert kernels._columns(512) == columns
    assert kernels._columns(200) == 128
