"""What a user got wrong is one line on standard error and exit code 2, before anything is compiled."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from moe_erc import console
from moe_erc.checks import BadInput, is_refusal
from moe_erc.launch import config_file, help_text

CONFIG = re.compile(r"--?config(=|$)")
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
PREFIX = re.compile(r"^(?:\w+Error: )+")  # of a message that a library wraps
ANY = 2**31 - 1  # steps and sizes are int32 on the devices
SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of the real numbers, which are float32 there
LIMITS = {
    "seed": (0, 2**32 - 1),
    "train.steps": (1, ANY),
    "train.profile_step": (0, ANY),
    "losses.lm.chunk": (1, ANY),
    "eval.every": (1, ANY),
    "eval.windows": (0, ANY),
    "eval.report_windows": (0, ANY),
    "eval.task_limit": (0, ANY),
    "checkpoint.every": (1, ANY),
    "checkpoint.keep": (1, ANY),
    "log.every": (1, ANY),
}


@contextlib.contextmanager
def refusing_bad_input():
    """Ends the program with one line and exit code 2 on a `BadInput`, and on a file that the system does not give.

    Everything else is a fault of the program, and goes through: a traceback and exit code 1.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        message = f"{error.strerror}: {error.filename!r}" if isinstance(error, OSError) else str(error)
    else:
        return
    print("error: " + console.printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def run(main, default_config: str | None = None, block: str = "") -> None:
    """`absl.app.run` that refuses an unknown flag, config file or config key in one line, and prints help of its own.

    With a `default_config` there are --config=FILE[:SIZE] and --config.a.b=value, read as `flags.FLAGS.config`.
    A config has to have the same keys, or those of one `block`, such as "data.", if the script reads no other.
    """
    console.make_safe()
    default_config = config_file.beside_the_script(default_config)
    if default_config:
        # The library would read overrides of its own default while it is being defined, where nothing can be refused.
        text = f"Config file and size, as --config=configs/vanilla.py:tiny; {default_config} if not given"
        with refusing_bad_input(), _refusing_flags():  # a file of flags is read here already
            config_flags.DEFINE_config_file("config", None, text)
    # Before anything is parsed: help is printed beside a flag that is wrong, too.
    if help_text.asked(sys.argv[1:]):
        full = any(argument.endswith("helpfull") for argument in sys.argv)
        help_text.show(full, default_config)
        sys.exit(0)
    if default_config and not any(CONFIG.match(argument) for argument in sys.argv):
        sys.argv.insert(1, f"--config={default_config}")
    app.run(main, argv=sys.argv, flags_parser=functools.partial(_parse, default_config, block))


def define_fields(kind, text):
    """A flag for every number of a dataclass, so named; returns a function that makes one of their values.

    `text` says in `--help` what they are of; the default is the example.
    """
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
    fields = [field for field in dataclasses.fields(kind) if field.type in define]
    holders = {}
    for field in fields:
        example = f"{text}: --{field.name}={field.default}"
        holders[field.name] = define[field.type](field.name, field.default, example)
    return lambda: kind(**{name: holder.value for name, holder in holders.items()})


def config_name():
    """What runs are named after: erc-tiny for --config=configs/erc.py:tiny, and for configs/erc.py."""
    path, _, size = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return f"{pathlib.Path(path).stem}-{size or 'tiny'}"


def check_numbers(config):
    """Refuses numbers of a config that scripts read themselves, out of the range that LIMITS gives their keys."""
    for key, value in config_file.leaves(config):
        _check_representable(key, value)
    for key, (least, most) in LIMITS.items():
        value = functools.reduce(getattr, key.split("."), config)
        if not least <= value <= most:
            bound = f"below {least}" if value < least else f"above {most}"
            raise BadInput(f"{key}: {value} is {bound}; give a number from {least} to {most}")


def _check_representable(key, value):
    """Refuses what devices and file systems cannot hold. Whether inf and nan are allowed the owner of a key knows."""
    most = LIMITS.get(key, (0, ANY))[1]
    if isinstance(value, int) and abs(value) > most:
        raise BadInput(f"{key}: {value} is beyond {most}; give a number nearer to 0")
    if isinstance(value, float) and math.isfinite(value) and value and not SMALLEST <= abs(value) <= LARGEST:
        raise BadInput(f"{key}: {value} is no number of float32; give one from {SMALLEST} to {LARGEST}, or 0")
    if isinstance(value, str) and "\0" in value:
        raise BadInput(f"{key}: {value!r} has a NUL character; leave it out")


def _parse(default_config, block, argv):
    with refusing_bad_input(), _refusing_flags():
        if "config" in flags.FLAGS:
            _check_config(default_config, block, argv)
        _, *strays = arguments = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries tell too much at the default
        if strays:
            raise BadInput(f"{strays[0]!r} is no option: options look like --workdir=DIR or --config.a.b=value")
        if "config" in flags.FLAGS:
            _check_values(default_config, block)
        return arguments


@contextlib.contextmanager
def _refusing_flags():
    """What the libraries raise for flags is bad input; their last line says it."""
    try:
        yield
    except flags.Error as error:
        raise BadInput(PREFIX.sub("", str(error).strip().splitlines()[-1])) from error


def _check_config(default_config, block, argv):
    """Every config file, and every `--config.a.b` against the keys of the last one, as that is the one that counts.

    The library would tell of a missing file in two sentences and suggest nothing for a key that is far from any.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    named = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := CONFIG.match(argument):
            named.append(argument[match.end() :] if match[1] else following)
    configs = [config_file.load(name) for name in named]
    config_file.check_fields(named[-1], configs[-1], config_file.load(default_config), block)
    known = [key for key, _ in config_file.leaves(configs[-1])]
    for override in filter(None, map(OVERRIDE.match, argv)):
        if override[1] not in known:
            raise BadInput(f"config.{override[1]}: no such key; {config_file.nearest_key(override[1], known)}")


def _check_values(default_config, block):
    """The types of values once more, now with those of the command line."""
    config = flags.FLAGS.config
    config_file.check_fields(flags.FLAGS["config"].config_filename, config, config_file.load(default_config), block)
