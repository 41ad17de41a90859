"""Is the router of an MoE coupled to its experts? Its router rows and gates give the answer.

    python -m moe_erc.diagnose runs/erc-tiny    a run of train.py, into its own directory
    python -m moe_erc.diagnose OLMoE-1B-7B      a Hugging Face MoE, into diagnosis/OLMoE-1B-7B

The command prints tables and a verdict, and writes diagnosis.json, diagnosis.md and figures/. It
reads no text and runs no model. Of a Hugging Face MoE it reads two matrices of each layer from the
safetensors, a layer at a time; docs/huggingface.md lists the families. A run may be
gs://bucket/path. Without the extra `plot` it draws no figures.
"""

from collections.abc import Iterable, Sequence

from absl import flags

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.diagnosis.of_model import report_diagnosis
from moe_erc.hf import inspect
from moe_erc.launch import command_line, compilation_cache, processes
from moe_erc.runs import open_run

OUTPUT = flags.DEFINE_string("output", None, "Where to write, as --output=found; else as above")
FAMILY = flags.DEFINE_string(
    "family",
    None,
    "Router, gate and layout of a family that the command does not know: "
    "--family='mlp.gate.weight,mlp.experts.{expert}.gate_proj.weight,expert'",
)


def main() -> None:
    """The command."""
    command_line.run(diagnose, arguments=("DIR",))


def diagnose(argv: list[str]) -> None:
    """Print and write the diagnosis of the run or the checkpoint in the directory argv[1]."""
    _, directory = argv
    with command_line.refusing_bad_input(), processes.ending_together():
        check(directory, OUTPUT.value, FAMILY.value)
        processes.initialize()
        compilation_cache.enable()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        name, default, layers, numbers = open_layers(directory, FAMILY.value)
    report_diagnosis(paths.absolute(OUTPUT.value or default), name, layers, numbers)


def check(directory: str, output: str | None, family: str | None) -> None:
    """BadInput for arguments that cannot be used, before anything is read."""
    place = paths.absolute(directory)
    if output and paths.absolute(output).exists() and not paths.absolute(output).is_dir():
        raise BadInput(f"--output={output}: is a file; name a directory")
    if not is_run(directory) and not (place / "config.json").exists():
        raise BadInput(
            f"{directory}: has neither checkpoints/ nor config.json; "
            "name a run of train.py, or the local directory of a Hugging Face MoE"
        )
    if family is not None and is_run(directory):
        raise BadInput(
            f"--family={family}: {directory} is a run, whose routers are known; leave --family out"
        )


def is_run(directory: str) -> bool:
    """Whether it is the directory of a run, and not of a Hugging Face MoE."""
    return (paths.absolute(directory) / "checkpoints").exists()


def open_layers(directory: str, family: str | None) -> tuple[str, str, Iterable, Sequence[int]]:
    """Open a run or a checkpoint, whose family may be a user's line.

    Returns (name, where its diagnosis is written by default, layers, their numbers). A layer is
    (router_ED, w_gate_EDF).
    """
    if is_run(directory):
        run = open_run(directory, with_text=False)
        print(f"{directory}: step {run.step}")
        return directory, directory, run.router_and_gates(), range(run.model.config.layers)
    moe = inspect.open_moe(directory, family)
    return moe.name, f"diagnosis/{moe.name}", moe, moe.layers


if __name__ == "__main__":
    main()
