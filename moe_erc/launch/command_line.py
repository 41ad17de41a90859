"""The command line: bad input is refused in one line, with exit code 2, before any compilation."""

import contextlib
import functools
import math
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moe_erc import console
from moe_erc.checks import BadInput, Range, in_range, is_refusal
from moe_erc.launch import config_file, help_text

CONFIG = re.compile(r"--?config(=|$)")
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
PREFIX = re.compile(r"^(?:\w+Error: )+")  # of a message that a library wraps
ANY = 2**31 - 1  # steps and sizes are int32 on the devices
# Real numbers are float32 on the devices.
SMALLEST = 1.2e-38
LARGEST = 3.4e38
# The limits of the numbers that scripts read themselves. Those of a block that has a dataclass are
# in its fields.
LIMITS = {
    "seed": Range(0, 2**32 - 1),
    "train.steps": Range(1, ANY),
    "train.profile_step": Range(0, ANY, note="0 takes no trace"),
    "losses.lm.chunk": Range(1, ANY),
    "eval.every": Range(1, ANY),
    "eval.windows": Range(0, ANY, note="0 takes all"),
    "eval.report_windows": Range(0, ANY, note="0 takes all"),
    "eval.task_limit": Range(0, ANY, note="0 takes all"),
    "checkpoint.every": Range(1, ANY),
    "checkpoint.keep": Range(1, ANY),
    "log.every": Range(1, ANY),
}


@contextlib.contextmanager
def refusing_bad_input() -> Iterator[None]:
    """A context that ends the program in one line, with exit code 2, on what a user can mend.

    That is a `BadInput`, or a file that the system does not give. Every other exception is a fault
    of the program. It is raised, and the program ends with a traceback and exit code 1.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.strerror}: {error.filename!r}"
    else:
        return
    print("error: " + console.printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def run(
    main: Callable[[list[str]], None],
    default_config: str | None = None,
    block: str = "",
    arguments: Sequence[str] = (),
) -> None:
    """Run a program as `absl.app.run` does, refuse bad input in one line, and print our own help.

    An unknown flag, config file or config key is refused, and so is a wrong number of arguments.

    Args:
      main: takes the name of the program and its arguments. The docstring of its module is the
        help.
      default_config: if given, the program has --config=FILE[:SIZE] and --config.a.b=value, which
        it reads as `flags.FLAGS.config`. A config must have the keys of this one.
      block: the start of the keys that the program reads, such as "data."; "" is all keys.
      arguments: the names of the arguments without a flag.
    """
    console.make_safe()
    default_config = config_file.beside_the_script(default_config)
    if default_config:
        text = (
            "Config file and size, as --config=configs/vanilla.py:tiny; "
            f"{default_config} if not given"
        )
        # The flag has no default here: the library would apply overrides to it while the flag is
        # defined, where nothing can be refused. A file of flags is read here already.
        with refusing_bad_input(), _refusing_flags():
            config_flags.DEFINE_config_file("config", None, text)
    # Help comes before parsing, so that it is printed also if another flag is wrong.
    if help_text.asked(sys.argv[1:]):
        full = any(argument.endswith("helpfull") for argument in sys.argv)
        help_text.show(sys.modules[main.__module__], full, default_config)
        sys.exit(0)
    if default_config and not any(CONFIG.match(argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={default_config}")
    parse = functools.partial(_parse, default_config, block, arguments)
    app.run(main, argv=sys.argv, flags_parser=parse)


def config_name() -> str:
    """The name of a run by its config: erc-tiny for configs/erc.py:tiny and for configs/erc.py."""
    path, _, size = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return f"{pathlib.Path(path).stem}-{size or 'tiny'}"


def check_numbers(config: ConfigDict) -> None:
    """Refuse numbers of a config that are beyond LIMITS, or that devices cannot represent."""
    for key, limit in LIMITS.items():
        value = functools.reduce(getattr, key.split("."), config)
        in_range(key, value, limit)
    for key, value in config_file.leaves(config):
        if key not in LIMITS:
            _check_representable(key, value)


def _check_representable(key: str, value: object) -> None:
    """Refuse numbers that devices cannot represent, and text that file systems cannot.

    inf and nan pass here; the reader of a key decides whether they are allowed.
    """
    if isinstance(value, int) and abs(value) > ANY:
        raise BadInput(f"{key}: {value} is beyond {ANY}; give a number nearer to 0")
    is_real = isinstance(value, float) and math.isfinite(value) and value != 0
    if is_real and not SMALLEST <= abs(value) <= LARGEST:
        raise BadInput(
            f"{key}: {value} is no number of float32; give one from {SMALLEST} to {LARGEST}, or 0"
        )
    if isinstance(value, str) and "\0" in value:
        raise BadInput(f"{key}: {value!r} has a NUL character; leave it out")


def _parse(
    default_config: str | None, block: str, arguments: Sequence[str], argv: list[str]
) -> list[str]:
    with refusing_bad_input(), _refusing_flags():
        if "config" in flags.FLAGS:
            _check_config(default_config, block, argv)
        remaining = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:
            # By default the libraries log too much.
            logging.set_verbosity(logging.WARNING)
        _check_arguments(remaining[1:], arguments)
        if "config" in flags.FLAGS:
            _check_values(default_config, block)
        return remaining


def _check_arguments(given: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a wrong number of arguments without a flag."""
    if len(given) == len(wanted):
        return
    if not wanted:
        raise BadInput(
            f"{given[0]!r} is no option: options look like --workdir=DIR or --config.a.b=value"
        )
    raise BadInput(
        f"{len(given)} arguments are given, {' '.join(map(repr, given))}; "
        f"give {len(wanted)}: {' '.join(wanted)}"
    )


@contextlib.contextmanager
def _refusing_flags():
    """A context that turns errors of flags into bad input, with the last line of their message."""
    try:
        yield
    except flags.Error as error:
        raise BadInput(PREFIX.sub("", str(error).strip().splitlines()[-1])) from error


def _check_config(default_config, block, argv):
    """Check every config file, and every `--config.a.b` against the keys of the last file.

    This comes before the library's own checks, which have no clear message for a missing file, and
    no suggestion for most unknown keys.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    named = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        match = CONFIG.match(argument)
        if match:
            has_equals_sign = bool(match[1])
            named.append(argument[match.end() :] if has_equals_sign else following)
    configs = [config_file.load(name) for name in named]
    config_file.check_fields(named[-1], configs[-1], config_file.load(default_config), block)
    known = [key for key, _ in config_file.leaves(configs[-1])]
    for argument in argv:
        override = OVERRIDE.match(argument)
        if override and override[1] not in known:
            key = override[1]
            nearest = config_file.nearest_key(key, known)
            raise BadInput(f"config.{key}: no such key; the nearest is config.{nearest}")


def _check_values(default_config, block):
    """Check the types of values again, now with the values of the command line."""
    name = flags.FLAGS["config"].config_filename
    reference = config_file.load(default_config)
    config_file.check_fields(name, flags.FLAGS.config, reference, block)
