"""The work, memory and traffic of one device, by the mesh over which a step is spread.

    python -m benchmarks.scale [--config=FILE:SIZE] [--meshes=1x1,1x2,2x1,2x2] [--json=FILE]

The figures are read from compiled programs for meshes of (data, expert) virtual devices. Nothing is
run, so there are no times. FLOPs are matmuls of one device and step. The length of the loop over
experts depends on routing; its FLOPs are the model's own count at equal load, the backward twice
the forward.
"""

import json
import pathlib

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import compile_ahead, environment
from benchmarks.compiled import chips
from moe_erc.launch import command_line
from moe_erc.model.config import ModelConfig

MESHES = flags.DEFINE_string(
    "meshes", "1x1,1x2,2x1,2x2,1x4,4x1,2x4,8x1", "data x expert, separated by commas"
)


def measure(config, devices, mesh):
    """The figures of one device on one mesh."""
    data, expert = mesh
    config.mesh.data = data
    config.mesh.expert = expert
    size = data * expert
    facts, programs = compile_ahead.lower(config, devices[:size])
    found = compile_ahead.compile_program(programs["step"])
    model = ModelConfig.of(config)
    # 6 D F forward, and three times that with the backward.
    expert_token = 3 * 6 * model.width * model.expert_width
    experts = model.layers * model.experts_per_token * expert_token * facts["tokens"]
    return {
        "mesh": mesh,
        "tokens": facts["tokens"],
        "expert_flops": experts,
        "other_flops": found["cost"].flops,
        "arguments": found["memory"].arguments,
        "temporaries": found["memory"].temporaries,
        "wire_bytes": found["cost"].wire_bytes,
    }


def main(_):
    config = flags.FLAGS.config
    with command_line.refusing_bad_input():
        meshes = [tuple(map(int, mesh.split("x"))) for mesh in MESHES.value.split(",")]
        largest = max(data * expert for data, expert in meshes)
        devices, _ = chips.described(None, 1, f"cpu:{largest}")
    rows = [measure(config, devices, mesh) for mesh in meshes]
    columns = (
        "mesh",
        "tokens",
        "experts, GFLOP",
        "all else, GFLOP",
        "state and batch, MB",
        "temporaries, MB",
        "sent, MB",
    )
    table = Table(
        *columns,
        title=f"{command_line.config_name()}: of one device and step",
        title_justify="left",
    )
    for row in rows:
        table.add_row(
            "{} x {}".format(*row["mesh"]),
            f"{row['tokens']:,.0f}",
            f"{row['expert_flops'] / 1e9:.2f}",
            f"{row['other_flops'] / 1e9:.2f}",
            f"{row['arguments'] / 1e6:.1f}",
            f"{row['temporaries'] / 1e6:.1f}",
            f"{row['wire_bytes'] / 1e6:.1f}",
        )
    Console(width=120).print(table)
    if compile_ahead.JSON.value:
        found = {"benchmark": "scale", "environment": environment(), "rows": rows}
        pathlib.Path(compile_ahead.JSON.value).write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py:tiny")
