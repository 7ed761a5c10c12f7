"""The package as a whole: what its import costs, which way imports run, who owns which dependency, what is declared."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "bigmodel"

# Imports run from later to earlier; those on one line do not import each other.
ORDER = (
    {"errors"},
    {"units"},
    {"checks"},
    {"allowance", "draws", "footprint", "progress"},
    {"checkpoint"},
    {"device_map", "offload"},
    {"hooks"},
    {"models", "saving"},
    {"loading"},
    {"launch"},
    {"generation", "training"},
    {"bench"},
    {"cli"},
    {"__main__"},
)

# What may ask the public surface although it lies below: `Plan.from_device_map` is `make_plan` by another name.
BACK_THROUGH_THE_DOOR = {"device_map/plan"}

# Who may import a third-party package. A name that ends in / is a folder; torch and numpy are everybody's.
OWNERS = {
    "huggingface_hub": {"checkpoint/hub"},
    "psutil": {"device_map/machine"},
    "rich": {"progress", "cli/app"},
    "safetensors": {"checkpoint/", "saving"},
    "transformers": {"models/pretrained", "generation/text", "bench/", "training/checkup"},
    "typer": {"cli/app", "cli/checking", "cli/configuring", "cli/ending", "cli/launching", "cli/options"},
}
EVERYBODYS = {"torch", "numpy"}
# What `bigmodel bench` compares with: each has one owner too, and comes with the extra of that name.
PEERS = {
    "accelerate": {"bench/peers/hugging_face"},
    "airllm": {"bench/peers/airllm"},
    "deepspeed": {"bench/peers/deepspeed", "training/zero", "training/zero_disk"},
    "gguf": {"bench/peers/gguf_file", "bench/peers/llama_cpp"},
    "xllamacpp": {"bench/peers/llama_cpp"},
}
# What comes with the extras "training", beside DeepSpeed and "quantization".
TRAINING = {
    "cloudpickle": {"launch/notebook"},
    "bitsandbytes": {"training/quantized"},
    "datasets": {"training/data"},
    "peft": {"models/adapters"},
    "torchao": {"training/float8"},
    "yaml": {"training/foreign"},
}
# The command line is made of typer and is imported by nothing, so it alone imports it at the top.
AT_THE_TOP = {(file, "typer") for file in OWNERS["typer"]}


class Import(NamedTuple):
    file: str  # such as "hooks/slots"
    line: int
    module: str  # such as "bigmodel.units"
    runs_at_import: bool  # not in a function, not for the type checker alone


def _imports() -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, file: str, runs: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(file, node.lineno, alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            # `from bigmodel import x` may mean the module x.
            prefix = f"{node.module}."
            names = [prefix + alias.name for alias in node.names] if node.module == "bigmodel" else [node.module or ""]
            found.extend(Import(file, node.lineno, name, runs) for name in names)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            runs = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                walk(child, file, False)
            for child in node.orelse:
                walk(child, file, runs)
            return
        for child in ast.iter_child_nodes(node):
            walk(child, file, runs)

    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).with_suffix("").as_posix()
        walk(ast.parse(path.read_text(encoding="utf-8")), file, True)
    return found


def _rank(part: str) -> int:
    ranks = [rank for rank, names in enumerate(ORDER) if part in names]
    assert ranks, f"bigmodel/{part} has no place in the order of imports: add it to ORDER"
    return ranks[0]


def _modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_cheap() -> None:
    loaded = _modules_after("import bigmodel")
    assert "bigmodel" in loaded
    assert not loaded & {"transformers", "huggingface_hub", "rich", "typer", "psutil", "accelerate", "safetensors"}


def test_help_does_not_load_torch() -> None:
    loaded = _modules_after("from bigmodel import cli\ntry: cli.app(['run', '--help'])\nexcept SystemExit: pass")
    assert "bigmodel.cli" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub"}


def test_every_file_can_be_imported_on_its_own() -> None:
    # One that works only after another hides a circle.
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
    names = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__main__.py"
    ]
    for order in (sorted(names), sorted(names, reverse=True)):
        subprocess.run([sys.executable, "-W", "error", "-c", code, *order], check=True)


def test_imports_run_one_way() -> None:
    wrong = []
    for file, line, module, _ in _imports():
        parts = module.split(".")
        if parts[0] != "bigmodel" or file == "__init__":
            continue
        here, there = file.split("/")[0], parts[1] if len(parts) > 1 else "__init__"
        names_a_module = (PACKAGE / there).is_dir() or (PACKAGE / f"{there}.py").is_file()
        if there == "__init__" or not names_a_module:
            # The public names are put together in loading.
            if _rank(here) <= _rank("loading") and file not in BACK_THROUGH_THE_DOOR:
                wrong.append(f"{file}:{line} imports the public surface")
        elif here != there and _rank(here) <= _rank(there):
            wrong.append(f"{file}:{line} imports bigmodel.{there}")
    assert not wrong, wrong


def test_every_third_party_package_has_one_owner() -> None:
    wrong = []
    for file, line, module, runs_at_import in _imports():
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or package == "bigmodel" or package in EVERYBODYS:
            continue
        owners = (OWNERS | PEERS | TRAINING).get(package, set())
        if file not in owners and not any(name.endswith("/") and file.startswith(name) for name in owners):
            wrong.append(f"{file}:{line} imports {package}, which {sorted(owners) or 'nobody'} owns")
        elif runs_at_import and (file, package) not in AT_THE_TOP:
            wrong.append(f"{file}:{line} imports {package} when it is imported itself; move that into the function")
    assert not wrong, wrong


def test_the_public_surface_imports_nothing_at_once() -> None:
    at_once = {module.split(".")[0] for file, _, module, runs in _imports() if file == "__init__" and runs}
    assert not at_once - sys.stdlib_module_names - {"bigmodel", "torch"}


def test_public_names_are_there_and_sorted() -> None:
    import bigmodel

    assert list(bigmodel.__all__) == sorted(bigmodel.__all__)
    assert [name for name in bigmodel.__all__ if not hasattr(bigmodel, name)] == []
    assert set(bigmodel.__all__) <= set(dir(bigmodel))


def test_no_drawer_files() -> None:
    refused = {"utils", "common", "helpers", "manager", "misc", "core", "engine"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.stem in refused or path.parent.name in refused]


def test_type_marker_is_in_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_dependencies_are_declared(project: dict) -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert declared == {canonicalize_name(name) for name in OWNERS | dict.fromkeys(EVERYBODYS)}
    assert set(project["optional-dependencies"]) >= {"training", "test", "bench"}
    peers = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"]["bench"]}
    assert peers >= {canonicalize_name(name) for name in PEERS}


def test_constraints_pin_what_the_tests_need(project: dict) -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(requirement.name)] = specifier.version
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text} refuses the pinned {pin}"
        # What a loop over installed packages shows is what was tested, unless someone tests another version on purpose.
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name).split("+")[0]), text


def test_script_is_declared(project: dict) -> None:
    assert project["scripts"] == {"bigmodel": "bigmodel.cli:main"}
