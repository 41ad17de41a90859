"""Who may import whom: mathematics <- modules <- training <- scripts."""

import ast
import pathlib
import sys

import pytest

from moe_erc.measures.registry import MEASURES

ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = {
    "losses": {"losses", "numerics", "random_keys", "sharding"},
    "moe": {"moe", "numerics", "random_keys", "sharding"},
    "model": {"model", "moe", "sharding"},
    "data": {"data"},
    "measures": {"measures", "losses", "numerics"},
    "training": {
        "training",
        "measures",
        "model",
        "moe",
        "losses",
        "numerics",
        "data",
        "random_keys",
        "sharding",
    },
    "evaluation": {"evaluation", "measures", "model", "data", "sharding", "tables"},
    "diagnosis": {"diagnosis", "measures", "model", "losses", "numerics", "sharding", "tables"},
    "hf": {"hf", "measures", "model", "moe", "data", "random_keys"},
    "study": {"study", "data", "diagnosis", "launch", "measures", "model"},
    "launch": {"launch", "console", "data"},
    "checks": set(),
    "numerics": set(),
    "random_keys": set(),
    "console": set(),
    "tables": {"console"},
    "sharding": {"tables"},
    "runs": {
        "data",
        "diagnosis",
        "evaluation",
        "hf",
        "launch",
        "losses",
        "measures",
        "model",
        "resume",
        "sharding",
        "training",
    },
    "resume": {"data", "losses", "model", "training"},
    "diagnose": {"data", "diagnosis", "hf", "launch", "runs", "sharding"},
    "export": {"data", "hf", "launch", "measures", "runs", "sharding"},
    "generate": {"console", "data", "evaluation", "launch", "runs", "sharding"},
    "train_tokenizer": {"data", "launch"},
    "__init__": {"losses"},
}
# Commands that lie beside what they start.
COMMANDS = {"data/tokenize.py": {"launch"}}


def imports(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "moe_erc"
            )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "moe_erc").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_package_imports_follow_the_table(path):
    inside = path.relative_to(ROOT / "moe_erc")
    part = inside.parts[0].removesuffix(".py")
    allowed = ALLOWED[part] | COMMANDS.get(str(inside), set())
    for module in imports(path):
        names = module.split(".")
        assert names[0] not in (
            "configs",
            "train",
            "eval",
            "benchmarks",
            "tests",
            "tensorflow",
            "pickle",
        ), module
        if names[0] == "moe_erc" and len(names) > 1 and names[1] != "checks":
            assert names[1] in allowed, f"{part} imports {module}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_configs_import_ml_collections_each_other_and_the_way_to_refuse_alone(path):
    own = {"moe_erc.checks", "moe_erc.checks.BadInput"}
    modules = {
        module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names
    }
    assert {module.split(".")[0] for module in modules - own} <= {"ml_collections", "configs"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").glob("*.py")), ids=lambda path: path.name
)
def test_studies_import_the_record_of_a_study_and_each_other_alone(path):
    modules = {
        module for module in imports(path) if module.split(".")[0] not in sys.stdlib_module_names
    }
    outside = {module for module in modules if module.split(".")[0] != "studies"}
    assert outside <= {"moe_erc.study.plan", "ml_collections"}


def test_no_file_of_no_subject():
    vague = {"utils", "util", "common", "helpers", "misc"}
    assert not [path for path in ROOT.glob("moe_erc/**/*.py") if path.stem in vague]


def encodings(path):
    """(line, whether it names the encoding) of every call by which a file opens text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and not ast.unparse(node.func).startswith(
            ("os.", "tensorstore.")
        ):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            constants = [item.value for item in given if isinstance(item, ast.Constant)]
            texts = [value for value in constants if isinstance(value, str)]
            binary = any("b" in text and set(text) <= set("rwxab+") for text in texts)
            if name in ("read_text", "write_text") or (name == "open" and not binary):
                yield node.lineno, any(keyword.arg == "encoding" for keyword in node.keywords)


OF_OUR_OWN = {"report.py", "of_model.py"}  # call diagnosis.report.write_text, which is UTF-8


@pytest.mark.parametrize(
    "path", sorted((ROOT / "moe_erc").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_text_is_read_or_written_in_the_encoding_of_the_console(path):
    """Where it is none of UTF-8, a file would be written in it, or not at all."""
    opened = dict(encodings(path)) if path.name not in OF_OUR_OWN else {}
    assert all(opened.values()), [line for line, named in opened.items() if not named]


def texts(path):
    """(line, text) of every string constant of a file but docstrings and parts of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.lineno, node.value


def test_no_measure_is_named_in_a_second_place():
    """Keys and labels stand in `moe_erc/measures/` alone; everything else takes them from there."""
    keys = {measure.key for measure in MEASURES.values() if "/" in measure.key}
    labels = {measure.label for measure in MEASURES.values() if " " in measure.label}
    paths = [*(ROOT / "moe_erc").rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]
    found = []
    for path in paths:
        if ROOT / "moe_erc" / "measures" not in path.parents:
            found += [
                f"{path}:{line}: {text}" for line, text in texts(path) if text in keys | labels
            ]
    assert not found


SCRIPTS = [ROOT / "train.py", ROOT / "eval.py", *ROOT.glob("study.py")]
READ = sorted([*(ROOT / "moe_erc").rglob("*.py"), *SCRIPTS])
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LONGEST = 40  # statements


def statements(function):
    """How many statements a function has; those of functions inside it are theirs."""
    found = 0
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        found += isinstance(node, ast.stmt)
        if not isinstance(node, FUNCTION):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_forty_statements(path):
    long = {node.name: statements(node) for node in functions(path) if statements(node) > LONGEST}
    assert not long


def folded(path):
    """Lines that hold two statements: a semicolon, a body behind a colon, or a pair of values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        if node.lineno in seen:
            yield node.lineno
        seen.add(node.lineno)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            yield from (target.lineno for target in node.targets if isinstance(target, ast.Tuple))


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_holds_one_statement(path):
    assert not sorted(set(folded(path)))


def untyped(body, owner=""):
    """Names of public functions and methods that leave an argument or the result without a type."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from untyped(node.body, f"{node.name}.")
        if not isinstance(node, FUNCTION) or node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if owner and arguments and arguments[0].arg in ("self", "cls"):
            arguments = arguments[1:]
        arguments += [rest for rest in (node.args.vararg, node.args.kwarg) if rest]
        if node.returns is None or any(argument.annotation is None for argument in arguments):
            yield f"{owner}{node.name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "moe_erc").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_public_functions_carry_types(path):
    assert not list(untyped(ast.parse(path.read_text(encoding="utf-8")).body))
