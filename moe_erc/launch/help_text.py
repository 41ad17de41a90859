"""The output of `--help`: the text of a program, its flags with examples, where config keys are."""

import textwrap
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict

from moe_erc.launch import config_file

ASKED = ("-h", "-?", "-help", "--help", "--helpshort", "-helpshort", "--helpfull", "-helpfull")
WIDTH = 80


def asked(arguments: list[str]) -> bool:
    """Whether one of the arguments of a command asks for help."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(argument in ASKED for argument in before)


def show(module: ModuleType, full: bool, default_config: str | None) -> None:
    """Print the help of a program to standard output.

    Args:
      module: of the program; its docstring and the flags that it defines are shown.
      full: whether every key of the default config is listed with its value.
      default_config: FILE[:SIZE]; None for a program without configs.
    """
    text = module.__doc__ or ""
    print(text.strip() + "\n")
    found = own_flags(module)
    if found:
        print("Flags:")
    for flag in found:
        print(f"  --{flag.name}")
        has_default = flag.default not in (None, "", [], False)
        default = f" Default: {flag.default_as_str}." if has_default else ""
        print(_indented(f"{flag.help.rstrip('.')}.{default}"))
    if default_config:
        _show_config(full, default_config)


def own_flags(module: ModuleType) -> list[flags.Flag]:
    """The flags that the program defines itself, by name, `config` first."""
    found = flags.FLAGS.get_key_flags_for_module(module)
    found += flags.FLAGS.flags_by_module_dict().get("moe_erc.launch.command_line", [])
    by_name = {flag.name: flag for flag in found}
    first = [by_name.pop("config")] if "config" in by_name else []
    return first + [by_name[name] for name in sorted(by_name)]


def _show_config(full, default_config):
    print("  --config.a.b=VALUE")
    example = "--config.data.sources=\"('c4/en',)\""
    text = f"Changes one key of the config, as --config.train.steps=100 or {example}."
    print(_indented(text))
    print(
        "\nEvery config key is listed with its default and meaning in configs/base.py; "
        "sizes are in configs/sizes.py."
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
