"""The work of ERC on each device at the paper's two settings, beside the paper's formula.

    python -m benchmarks.erc_mesh [--json=FILE]

Expert tokens of a device in a step, where an expert token is one token through one expert, 6 D F
FLOPs forward:

    tokens  K N / dp
    paper   E (E / ep) / 3     every data rank computes all rows
    ours    E^2 / (3 dp ep)    every device of the mesh dp x ep computes its own slice of F

The work is read from compiled programs. They are compiled at full size for virtual devices, and not
run. FLOPs are those of matmuls. The noise bound and the draw are elementwise: they add 3 E^2 D / ep
and about 50 E D a layer. If the paper's expert groups lie within its data ranks, dp 64, ep 8 is a
mesh of 8 x 8, else of 64 x 8.
"""

import argparse
import json
import pathlib

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks import environment
from benchmarks.compiled import costs
from configs import base
from moe_erc import sharding
from moe_erc.losses.erc import erc_loss
from moe_erc.model.config import ModelConfig

# Size, the paper's dp and ep, mesh.
SETTINGS = (
    ("3b", 32, 1, (32, 1)),
    ("15b", 64, 8, (8, 8)),
    ("15b", 64, 8, (64, 8)),
)


def measure(size, paper_dp, paper_ep, mesh_shape):
    """The figures of one setting, of one device and optimizer step."""
    config = base.get_config(size)
    model = ModelConfig.of(config)
    mesh = sharding.make_mesh(*mesh_shape)
    tokens = config.train.batch_size * config.data.sequence_length
    experts = model.experts
    expert_token = 6 * model.width * model.expert_width
    forward = compile_erc(model, mesh, gradient=False)
    backward = compile_erc(model, mesh, gradient=True)
    forward_flops = costs.cost(forward.as_text()).flops
    both = costs.cost(backward.as_text())
    paper_erc = experts * (experts / paper_ep) / 3
    paper_tokens = model.experts_per_token * tokens / paper_dp
    of_experts = model.layers * model.experts_per_token * expert_token * tokens / mesh.size
    of_forward = model.flops_per_token(config.data.sequence_length) * tokens / mesh.size
    return {
        "size": size,
        "mesh": mesh_shape,
        "paper_share": paper_erc / paper_tokens,
        "share_of_experts": forward_flops / of_experts,
        "share_of_forward": forward_flops / of_forward,
        "paper_flops": 2 * model.layers * experts**2 * model.width * model.expert_width / paper_ep,
        "forward_flops": forward_flops,
        "step_flops": both.flops,
        "wire_bytes": both.wire_bytes,
        "temporary_bytes": costs.memory(backward).temporaries,
    }


def compile_erc(model, mesh, gradient):
    """ERC of all layers, or with its gradients, for parameters sharded as in training."""
    router = (model.layers, model.experts, model.width)
    abstract = {
        "router": jax.ShapeDtypeStruct(router, "float32"),
        "w_gate": jax.ShapeDtypeStruct((*router, model.expert_width), "float32"),
    }
    params = sharding.shard_state(mesh, abstract)
    everywhere = NamedSharding(mesh, P())
    lies = jax.tree.map(lambda leaf: leaf.sharding, params)

    def loss(params, rng):
        return erc_loss(params, rng, mesh=mesh)

    program = jax.value_and_grad(loss) if gradient else loss
    outputs = (everywhere, lies) if gradient else everywhere
    key = jax.eval_shape(jax.random.key, 0)
    return jax.jit(program, out_shardings=outputs).lower(params, key).compile()


def show(rows):
    """The table of docs/performance.md."""
    columns = (
        "size",
        "mesh",
        "paper, share",
        "ours, share",
        "of whole forward",
        "GFLOP, paper",
        "ours",
        "with gradients",
    )
    table = Table(*columns, "MB sent", "MB temporary", title="ERC, a device and step")
    for row in rows:
        table.add_row(
            row["size"],
            "{} x {}".format(*row["mesh"]),
            f"{row['paper_share']:.4%}",
            f"{row['share_of_experts']:.4%}",
            f"{row['share_of_forward']:.4%}",
            f"{row['paper_flops'] / 1e9:,.1f}",
            f"{row['forward_flops'] / 1e9:,.1f}",
            f"{row['step_flops'] / 1e9:,.1f}",
            f"{row['wire_bytes'] / 1e6:,.1f}",
            f"{row['temporary_bytes'] / 1e6:,.1f}",
        )
    Console(width=160).print(table)


def main():
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    largest = max(data * expert for _, _, _, (data, expert) in SETTINGS)
    jax.config.update("jax_num_cpu_devices", largest)
    rows = [measure(*setting) for setting in SETTINGS]
    show(rows)
    if arguments.json:
        plain = {"benchmark": "erc_mesh", "environment": environment(), "rows": rows}
        arguments.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
