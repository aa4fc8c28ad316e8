"""The house: a file imports strictly lower floors only, and the pure floors know torch and the standard library."""

import ast
import sys
from pathlib import Path

import pytest

import kleash

PACKAGE = Path(kleash.__file__).parent

TOP = 16
FLOORS = {
    **dict.fromkeys(["errors", "version"], 0),
    **dict.fromkeys(["checks"], 1),
    **dict.fromkeys(["masking", "batch"], 2),
    **dict.fromkeys(
        ["divergence", "estimators", "logprobs", "rewards", "advantages", "losses", "leash", "kl_form", "glossary"], 3
    ),
    **dict.fromkeys(["token_class", "repetition", "tail", "overoptimisation", "weights"], 3),
    **dict.fromkeys(["control", "best_of_n", "precision", "pieces"], 4),
    **dict.fromkeys(["seeds", "models", "interrupt", "fused", "generators"], 4),
    **dict.fromkeys(["linear_head", "reference", "prompts", "scorers", "rollout", "frontier", "alarms", "dealing"], 5),
    **dict.fromkeys(["language_model", "verdict", "given_responses", "plan", "doubts"], 6),
    **dict.fromkeys(["scoring", "ppo", "pair", "page"], 7),
    **dict.fromkeys(["targets", "drift", "config", "run_directory", "reading", "drift_tables", "shading"], 8),
    **dict.fromkeys(["checkpoint", "progress", "parts", "drift_map", "report", "measure_page"], 9),
    **dict.fromkeys(["first_beta", "preflight", "token_map", "tally"], 10),
    **dict.fromkeys(["run", "measured", "measuring"], 11),
    **dict.fromkeys(["guard", "readout", "samples"], 12),
    **dict.fromkeys(["training", "measurement", "baseline"], 13),
    **dict.fromkeys(["demo", "sweep", "integrations"], 14),
    **dict.fromkeys(["cli"], 15),
    **dict.fromkeys(["__init__", "__main__"], TOP),
}
ONE_ROOM = {"demo", "fused", "integrations", "preflight"}  # whose files may import each other, without a cycle
PURE = 3  # the highest floor that knows torch and the standard library only
FORBIDDEN_LIBRARIES = {"logging", "random", "os", "pathlib", "io", "shutil", "tempfile", "subprocess", "importlib"}
FORBIDDEN_NAMES = {"open", "print", "input", "__import__"}
FORBIDDEN_TORCH = {"cuda", "distributed", "save", "load", "device", "manual_seed", "Generator"} | {
    "rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal", "set_num_threads"
}  # fmt: skip


def source_files(package: Path) -> dict[str, str]:
    """{dotted module: source} of every Python file; `kleash.demo.__init__` keeps its last part."""
    return {
        ".".join([package.name, *path.relative_to(package).with_suffix("").parts]): path.read_text("utf-8")
        for path in sorted(package.rglob("*.py"))
    }


def room(module: str) -> str:
    """The part that stands in the table: `masking` of kleash.masking, `demo` of kleash.demo.world."""
    return module.split(".")[1]


def imported(module: str, source: str, modules: set[str]) -> list[str]:
    """Every module that the file imports anywhere in it; of kleash the very file that is meant."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write the import from kleash in full."
            children = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [child if is_file(child, modules) else node.module for child in children]
    return [f"{name}.__init__" if f"{name}.__init__" in modules else name for name in names]


def is_file(name: str, modules: set[str]) -> bool:
    return name in modules or f"{name}.__init__" in modules


def complaints(sources: dict[str, str]) -> list[str]:
    """What is wrong with the house, one sentence each; empty when nothing is."""
    modules, found = set(sources), []
    for module, source in sources.items():
        if room(module) not in FLOORS:
            found.append(f"{module} has no floor: add it to the table of this test and to the README's file map.")
            continue
        floor = FLOORS[room(module)]
        for name in dict.fromkeys(imported(module, source, modules)):
            if name.split(".")[0] != "kleash":
                continue
            if name not in modules:
                found.append(f"{module} imports {name}, which does not exist.")
            elif room(name) not in FLOORS or (room(name) == room(module) and room(name) in ONE_ROOM):
                continue
            elif FLOORS[room(name)] >= floor:
                above = FLOORS[room(name)]
                found.append(f"{module} (floor {floor}) imports {name} (floor {above}): only lower floors are allowed.")
        if floor <= PURE:
            found += impurities(module, source, modules)
    return found + [f"{' -> '.join(cycle)} import each other in a circle." for cycle in cycles(sources)]


def impurities(module: str, source: str, modules: set[str]) -> list[str]:
    """Libraries, files, devices and randomness that a file of a pure floor may not touch."""
    allowed = (set(sys.stdlib_module_names) | {"torch", "kleash"}) - FORBIDDEN_LIBRARIES
    used = [name for name in imported(module, source, modules) if name.split(".")[0] not in allowed]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            used.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr in FORBIDDEN_TORCH:
                used.append(f"torch.{node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            heads = [alias.name for alias in node.names]
            path = getattr(node, "module", None)
            names = [f"{path}.{head}" if path else head for head in heads]
            used += [name for name in names if name.startswith("torch.") and name.split(".")[1] in FORBIDDEN_TORCH]
    return [f"{module} (floor {FLOORS[room(module)]}) uses {name}: that belongs on floor {PURE + 1}." for name in used]


def cycles(sources: dict[str, str]) -> list[list[str]]:
    """Circles among the imports, each once."""
    modules, finished, found = set(sources), set(), []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in finished:
            for name in imported(module, sources[module], modules):
                if name in modules:
                    visit(name, [*path, module])
            finished.add(module)

    for module in sources:
        visit(module, [])
    return found


def test_every_file_of_the_package_keeps_to_its_floor():
    found = complaints(source_files(PACKAGE))
    assert not found, "\n" + "\n".join(found)


def test_the_table_names_files_that_could_exist():
    assert set(FLOORS.values()) == set(range(TOP + 1))
    assert {"kleash.errors", "kleash.masking", "kleash.__init__"} <= set(source_files(PACKAGE))


HOUSE = {
    "kleash.__init__": "from kleash.estimators import k1",
    "kleash.errors": "",
    "kleash.checks": "import math\nimport torch\nfrom kleash.errors import InputError",
    "kleash.masking": "from torch import Tensor\nimport kleash.checks",
    "kleash.estimators": "from kleash import masking",
    "kleash.training": "import os\nimport transformers\nfrom kleash.estimators import k1",
    "kleash.demo.__init__": "",
    "kleash.demo.world": "from kleash.demo.text import words",
    "kleash.demo.text": "from kleash.estimators import k1",
}


def test_a_good_house_has_no_complaints():
    assert complaints(HOUSE) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("kleash.checks", "from kleash.masking import masked", "floor 1) imports kleash.masking (floor 2)"),
        ("kleash.checks", "from kleash import masking", "floor 1) imports kleash.masking (floor 2)"),
        ("kleash.checks", "import kleash.masking as m", "floor 1) imports kleash.masking (floor 2)"),
        ("kleash.masking", "def f():\n    import kleash.batch", "kleash.batch, which does not exist"),
        ("kleash.training", "from kleash import k1", "imports kleash.__init__ (floor 16)"),
        ("kleash.training", "from kleash.demo import world", "imports kleash.demo.world (floor 14)"),
        ("kleash.masking", "if True:\n    from kleash.estimators import k1", "imports kleash.estimators (floor 3)"),
        ("kleash.demo.text", "from kleash.demo.world import World", "import each other in a circle"),
        ("kleash.helpers", "", "kleash.helpers has no floor: add it to the table"),
        ("kleash.masking", "import numpy", "uses numpy"),
        ("kleash.masking", "from transformers import AutoModel", "uses transformers"),
        ("kleash.masking", "import os.path", "uses os.path"),
        ("kleash.masking", "from pathlib import Path", "uses pathlib"),
        ("kleash.masking", "import logging", "uses logging"),
        ("kleash.masking", "x = open('file')", "uses open"),
        ("kleash.masking", "import torch\nx = torch.cuda.is_available()", "uses torch.cuda"),
        ("kleash.masking", "import torch.distributed as dist", "uses torch.distributed"),
        ("kleash.masking", "from torch import cuda", "uses torch.cuda"),
        ("kleash.masking", "import torch\nx = torch.randn(3)", "uses torch.randn"),
    ],
)
def test_a_file_on_the_wrong_floor_is_named(module, line, complaint):
    found = complaints({**HOUSE, module: f"{HOUSE.get(module, '')}\n{line}"})
    assert any(complaint in sentence for sentence in found), found


def test_a_relative_import_is_refused():
    with pytest.raises(AssertionError, match=r"kleash\.masking line 1: write the import from kleash in full"):
        complaints({**HOUSE, "kleash.masking": "from .checks import require_mask"})
