"""What `--help` prints: the script's own text, every flag of its own with an example, and where config keys are."""

import sys
import textwrap
from collections.abc import Iterator

from absl import flags
from ml_collections import ConfigDict

from moe_erc.launch import config_file

ASKED = ("-h", "-?", "-help", "--help", "--helpshort", "-helpshort", "--helpfull", "-helpfull")
WIDTH = 80


def asked(arguments: list[str]) -> bool:
    """Whether one of the arguments of a command asks for help."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ASKED for argument in before)


def show(full: bool, default_config: str | None) -> None:
    """Prints it to standard output; in `full` every key of the default config with its value as well."""
    text = sys.modules["__main__"].__doc__ or ""
    print(text.strip() + "\n")
    print("Flags:")
    for flag in own_flags():
        print(f"  --{flag.name}")
        default = (
            "" if flag.default in (None, "", [], False) else f" Default: {flag.default_as_str}."
        )
        print(_indented(f"{flag.help.rstrip('.')}.{default}"))
    if default_config:
        _show_config(full, default_config)


def own_flags() -> Iterator[flags.Flag]:
    """Those that the script defines itself, by name, `config` first."""
    values = flags.FLAGS
    found = values.get_key_flags_for_module(sys.argv[0])
    found = found + values.flags_by_module_dict().get("moe_erc.launch.command_line", [])
    yield from sorted(
        {flag.name: flag for flag in found}.values(),
        key=lambda flag: (flag.name != "config", flag.name),
    )


def _show_config(full, default_config):
    print("  --config.a.b=VALUE")
    print(
        _indented(
            "Changes one key of the config, as --config.train.steps=100 or --config.data.sources=\"('c4/en',)\"."
        )
    )
    print(
        "\nEvery config key is listed with its default and meaning in configs/base.py; sizes are in configs/sizes.py."
    )
    if not full:
        print("--helpfull prints every key with the value that it has here. Config files:")
        print(_indented(", ".join(config_file.known_files())))
        return
    print(f"The keys, with their values in {default_config}:")
    config: ConfigDict = config_file.load(default_config)
    for key, value in config_file.leaves(config):
        print(f"  --config.{key}={value!r}")


def _indented(text):
    return textwrap.fill(
        text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
    )
