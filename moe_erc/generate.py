"""Continues a prompt with the model of a run, or with an OLMoE, token by token.

    python -m moe_erc.generate runs/erc-tiny "def main(" --temperature=0.8 --top_p=0.9

The first argument is the workdir of a run, a directory or gs://bucket/path, or the local directory
of an OLMoE as Hugging Face has it, with its tokenizer.json.
"""

import itertools
import sys

from absl import flags

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.console import printable
from moe_erc.data import paths
from moe_erc.evaluation.generate import Generator
from moe_erc.evaluation.sampling import Sampling
from moe_erc.launch import command_line, compilation_cache, processes
from moe_erc.runs import Opened, open_checkpoint, open_run

NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 128, "At most so many tokens are written, as --new_tokens=32"
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Of the draw, as --temperature=0.8; 0 takes the most probable token"
)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Of the most probable tokens so many may be drawn, as --top_k=40; 0 is all"
)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Of those the smallest prefix of this probability, as --top_p=0.9; 1 is all"
)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws, as --seed=1")


def main() -> None:
    """The command."""
    command_line.run(generate, arguments=("RUN|DIR", "PROMPT"))


def generate(argv: list[str]) -> None:
    """Print the prompt argv[2] and its continuation by the model at argv[1]."""
    _, place, prompt = argv
    with command_line.refusing_bad_input(), processes.ending_together():
        sampling = Sampling(
            NEW_TOKENS.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, SEED.value
        )
        processes.initialize()
        compilation_cache.enable()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        opened = open_model(place)
        generator = Generator(opened.model, opened.tokenizer)
        generator.check(prompt, sampling)
    pieces = generator.stream(opened.weights, prompt, sampling)
    for piece in itertools.chain([prompt], pieces):
        text = printable(piece) if sys.stdout.isatty() else piece
        print(text, end="", flush=True)
    print()


def open_model(place: str) -> Opened:
    """The model of a run, or that of an OLMoE.

    Raises:
      BadInput: for a directory that is neither.
    """
    directory = paths.absolute(place)
    if (directory / "checkpoints").exists():
        return open_run(place, with_text=False)
    if not paths.is_remote(place) and (directory / "config.json").exists():
        return open_checkpoint(place)
    raise BadInput(
        f"{place} has neither checkpoints nor a config.json; "
        "give the workdir of a run, or the local directory of an OLMoE"
    )


if __name__ == "__main__":
    main()
