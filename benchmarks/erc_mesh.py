"""What ERC costs each device at the paper's two settings, read off its compiled program, beside the paper's formula.

    python -m benchmarks.erc_mesh [--json=FILE]

    paper   E (E / ep) / 3  expert tokens a device, against its  K N / dp     every data rank computes all rows
    ours    E^2 / (3 dp ep) expert tokens a device, of mesh dp x ep           every device its own slice of F

An expert token is one token through one expert: 6 D F FLOPs forward. Programs are compiled, at full
size, for virtual devices: nothing is run. FLOPs are of matmuls; the noise bound and the draw,
elementwise, come to 3 E^2 D / ep and about 50 E D a layer. If the paper's expert groups lie within
its data ranks, dp 64, ep 8 is a mesh of 8 x 8, else 64 x 8.
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

SETTINGS = (
    ("3b", 32, 1, (32, 1)),
    ("15b", 64, 8, (8, 8)),
    ("15b", 64, 8, (64, 8)),
)  # size, the paper's dp and ep, mesh


def measure(size, paper_dp, paper_ep, mesh_shape):
    """The figures of one setting, of one device and optimizer step."""
    config = base.get_config(size)
    model = ModelConfig.of(config)
    mesh = sharding.make_mesh(*mesh_shape)
    tokens = config.train.batch_size * config.data.sequence_length
    experts = model.experts
    expert_token = 6 * model.width * model.expert_width
    forward, backward = (compile_erc(model, mesh, gradient) for gradient in (False, True))
    forward_flops = costs.cost(forward.as_text()).flops
    both = costs.cost(backward.as_text())
    return {
        "size": size,
        "mesh": mesh_shape,
        "paper_share": experts
        * (experts / paper_ep)
        / 3
        / (model.experts_per_token * tokens / paper_dp),
        "share_of_experts": forward_flops
        / (model.layers * model.experts_per_token * expert_token * tokens / mesh.size),
        "share_of_forward": forward_flops
        / (model.flops_per_token(config.data.sequence_length) * tokens / mesh.size),
        "paper_flops": 2 * model.layers * experts**2 * model.width * model.expert_width / paper_ep,
        "forward_flops": forward_flops,
        "step_flops": both.flops,
        "wire_bytes": both.wire_bytes,
        "temporary_bytes": costs.memory(backward).temporaries,
    }


def compile_erc(model, mesh, gradient):
    """ERC of all layers, or with its gradients, for parameters that lie as the trainer keeps them."""
    shapes = {
        "router": (model.experts, model.width),
        "w_gate": (model.experts, model.width, model.expert_width),
    }
    params = sharding.shard_state(
        mesh,
        {
            name: jax.ShapeDtypeStruct((model.layers, *shape), "float32")
            for name, shape in shapes.items()
        },
    )
    everywhere = NamedSharding(mesh, P())
    lies = jax.tree.map(lambda leaf: leaf.sharding, params)

    def loss(params, rng):
        return erc_loss(params, rng, mesh=mesh)

    program = jax.value_and_grad(loss) if gradient else loss
    outputs = (everywhere, lies) if gradient else everywhere
    key = jax.eval_shape(lambda: jax.random.key(0))
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
        shares = (
            f"{row[name]:.4%}" for name in ("paper_share", "share_of_experts", "share_of_forward")
        )
        giga = (
            f"{row[name] / 1e9:,.1f}" for name in ("paper_flops", "forward_flops", "step_flops")
        )
        mega = (f"{row[name] / 1e6:,.1f}" for name in ("wire_bytes", "temporary_bytes"))
        table.add_row(row["size"], "{} x {}".format(*row["mesh"]), *shares, *giga, *mega)
    Console(width=160).print(table)


def main():
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here, too")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(data * expert for *_, (data, expert) in SETTINGS))
    rows = [measure(*setting) for setting in SETTINGS]
    show(rows)
    if arguments.json:
        plain = {"benchmark": "erc_mesh", "environment": environment(), "rows": rows}
        arguments.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
