"""A config file that cannot be used: one line that names it, and the nearest file, size or key."""

import pytest

from configs import erc
from moe_erc.checks import BadInput
from moe_erc.launch import config_file
from tests import script

BASE = (
    "from configs import base\ndef get_config(size=''):\n    config = base.get_config(size)\n    "
)
FILES = {
    "key.py": BASE + "config.model.widht = 3\n    return config\n",
    "gone.py": BASE + "del config.model['width']\n    return config\n",
    "none.py": BASE + "config.model.width = None\n    return config\n",
    "kind.py": BASE + "config.model.width = 'wide'\n    return config\n",
    "switch.py": BASE + "config.routers.softmax.renormalize = None\n    return config\n",
    "syntax.py": "\ndef get_config(size=''\n    return 3\n",
    "fails.py": BASE + "return config.model['a'] + 1\n",
    "division.py": BASE + "1 / 0\n",
    "imports.py": "import no_such_module\n",
    "empty.py": "x = 3\n",
    "other.py": "get_config = 3\n",
    "dict.py": "def get_config(size=''):\n    return {}\n",
    "nothing.py": "def get_config(size=''):\n    pass\n",
    "no_size.py": "from configs import base\ndef get_config():\n    return base.get_config()\n",
    "bytes.py": "\0\0",
}
REFUSED = [
    ("configs/erc", ["'configs/erc'", "configs/erc.py"]),
    ("erc", ["'erc'", "configs/erc.py"]),
    ("erc:tiny", ["'erc'", "configs/erc.py"]),
    ("configs/erk.py:tiny", ["'configs/erk.py'", "configs/erc.py"]),
    ("configs/vanila.py", ["configs/vanila.py", "configs/vanilla.py"]),
    ("no_noise.py", ["no_noise.py", "configs/ablations/no_noise.py"]),
    ("", ["no file is named", "FILE[:SIZE]"]),
    (":tiny", ["no file is named", "FILE[:SIZE]"]),
    ("configs", ["'configs' is a directory", "configs/"]),
    ("configs/ablations", ["directory", "configs/ablations/activation.py"]),
    ("configs/erc.py:tinny", ["'tinny'", "debug, tiny, mini, small", "the nearest is 'tiny'"]),
    ("configs/erc.py:olmoe", ["'olmoe'", "the nearest is 'olmoe_1b_7b'"]),
    ("configs/sizes.py", ["configs/sizes.py", "get_config"]),
    ("{key.py}", ["config.model.widht", "config.model.width"]),
    ("{gone.py}", ["config.model.width", "missing"]),
    ("{none.py}", ["config.model.width", "None", "int"]),
    ("{kind.py}", ["line 4 of", "kind.py", "wide"]),
    ("{switch.py}", ["config.routers.softmax.renormalize", "None", "bool"]),
    ("{syntax.py}", ["line 2 of", "syntax.py"]),
    ("{fails.py}", ["line 4 of", "fails.py", "'a'"]),
    ("{division.py}", ["line 4 of", "division.py", "division by zero"]),
    ("{imports.py}", ["line 1 of", "no_such_module"]),
    ("{empty.py}", ["empty.py", "get_config"]),
    ("{other.py}", ["other.py", "get_config"]),
    ("{dict.py}", ["dict.py", "dict", "ConfigDict"]),
    ("{nothing.py}", ["nothing.py", "NoneType", "ConfigDict"]),
    ("{no_size.py}:tiny", ["no_size.py", "get_config()"]),
    ("{bytes.py}", ["bytes.py"]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path} of all config files."""
    directory = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        (directory / name).write_text(text, encoding="utf-8")
    return {name: str(directory / name) for name in FILES}


@pytest.mark.parametrize(
    "argument, words", REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_is_refused(argument, words, files, monkeypatch):
    monkeypatch.chdir(script.ROOT)
    for name, path in files.items():
        argument = argument.replace(f"{{{name}}}", path)
    with pytest.raises(BadInput) as refusal:
        config_file.check_fields(argument, config_file.load(argument), erc.get_config())
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert "ValueError" not in message and "Traceback" not in message


@pytest.mark.parametrize("arguments, words", [
    (["--config=configs/erk.py"], ["'configs/erk.py'", "configs/erc.py"]),
    (["--config=configs/erc.py:hug"], ["'hug'", "debug, tiny"]),
    (["--config="], ["no file is named"]),
    (["--config"], ["no file is named"]),
    (["--config=configs"], ["directory"]),
    (["--config=a\x1b[2J\nb"], ["a\\x1b[2J"]),
    (["--config={fails.py}"], ["line 4 of", "fails.py"]),
    (["--config={key.py}:debug"], ["config.model.widht", "config.model.width"]),
    (["--flagfile=/no/flags"], ["/no/flags"]),
    (["--config.train.steps"], ["config.train.steps"]),
    (["--noconfig.routers.aoe.renormalise"],
     ["config.routers.aoe.renormalise", "config.routers.aoe.renormalize"]),
    (["--config.train.steps=3", "--config=configs/erc.py"], ["--config.train.steps=3", "--config"]),
    (["--config.losses.erc={'weight': 3}"], ["config.losses.erc", "config.losses.erc."]),
])  # fmt: skip
def test_a_script_says_so_in_one_line(arguments, words, files, tmp_path):
    for name, path in files.items():
        arguments = [argument.replace(f"{{{name}}}", path) for argument in arguments]
    code, printed = script.run(
        "train.py", [f"--workdir={tmp_path / 'run'}", *arguments], tmp_path / "out"
    )
    (line,) = printed.splitlines()
    assert code == 2 and line.startswith("error: ") and all(word in line for word in words), printed
    assert "ValueError" not in line and not (tmp_path / "run").exists()


def test_a_config_of_one_block_serves_a_script_that_reads_no_other():
    whole = erc.get_config("debug")
    part = erc.get_config("debug")
    del part["model"]
    config_file.check_fields("file", part, whole, block="data.")
    with pytest.raises(BadInput, match=r"config\.model\..* is missing"):
        config_file.check_fields("file", part, whole)


def test_the_configs_of_a_clone_lie_beside_the_package():
    """test_notebooks.py has the same of a wheel."""
    assert config_file.PROJECT == script.ROOT


def test_every_config_passes(monkeypatch):
    monkeypatch.chdir(script.ROOT)
    found = list(config_file.known_files())
    assert "configs/erc.py" in found and "configs/ablations/no_noise.py" in found
    for name in found:
        config_file.check_fields(name, config_file.load(f"{name}:debug"), erc.get_config())
