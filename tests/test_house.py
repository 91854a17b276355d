"""Law 8, the house: imports run one way, every method has its row, public names are few."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peft_any
from peft_any.registry import method_for, method_names
from tests.cases import ATTENDED, CASES, PROMPTS, ROUTED

PACKAGE = Path(peft_any.__file__).parent
LAYERS = [
    {"_typing", "errors"},
    {"_dtypes", "_imports", "arguments"},
    {"_libraries"},
    {"_arrays", "_jaxpr"},
    {"_engines", "_kernels", "_memory", "_ways"},
    {"backend"},
    {"tape"},
    {"autodiff", "custom"},
    {
        "_tree",
        "linalg",
        "blocks",
        "_fused",
        "traversal",
        "rng",
        "layer",
        "outputs",
        "site",
        "patterns",
        "plugins",
        "dropout",
        "checks",
        "fields",
        "hints",
        "replication",
    },
    {
        "activations",
        "clusters",
        "decompositions",
        "initial",
        "mixtures",
        "projections",
        "spectra",
        "wavelets",
    },
    {"joint", "segments"},
    {"starts", "registry", "tokens", "factors", "single", "alora", "arrow", "gates"},
    {"prompt", "variants"},
    {"prompts"},
    {"encoders", "prefixes"},
    {"method"},
    {"routed"},
    {"contract"},
    {"methods", "layout", "selection", "sizing", "targets", "extras", "io"},
    {"naming"},
    {"adapter"},
    {"attention"},
    {"parts", "bound", "bank", "completing", "placed", "origin"},
    {"view"},
    {"model", "receipt"},
    {"surgery", "oneshot", "algebra", "experts", "xlora"},
    {"train"},
    {"demo"},
    {"cli", "integrations", "testing"},
]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
DESIGN = PACKAGE.parent / "docs" / "design.md"
LIBRARIES = {
    "torch", "jax", "cupy", "dask", "distributed", "array_api_strict", "array_api_compat",
}  # fmt: skip


def modules() -> list[Path]:
    """List the package's source files."""
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py")
    ]


def imports(path: Path) -> set[str]:
    """Read the modules that a file imports anywhere, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def rank(module: str) -> int | None:
    """Place a module in the order of imports."""
    parts = module.split(".")
    return RANK.get(parts[1]) if parts[0] == "peft_any" and len(parts) > 1 else None


def relative(path: Path) -> str:
    """Name a file for a test's id."""
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    own = RANK[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    above = {m for m in imports(path) if (r := rank(m)) is not None and r > own}
    assert not above


def test_the_design_tells_where_every_module_is() -> None:
    table = (
        DESIGN.read_text(encoding="utf-8").partition("## Where things are")[2].partition("## ")[0]
    )
    named = re.findall(r"`(\w+)/?`", table.partition("Imports run")[0])
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in modules()}
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_one_module_names_the_array_libraries(path: Path) -> None:
    if path.stem in (
        "backend",
        "_arrays",
        "_libraries",
        "_dtypes",
        "_imports",
        "_engines",
        "_jaxpr",
        "cluster",
        "libraries",
    ) or path.is_relative_to(PACKAGE / "integrations"):
        pytest.skip("these are the modules that do")
    named = {m.split(".")[0] for m in imports(path)}
    assert not named & LIBRARIES
    if path.parent.name == "methods":
        assert "numpy" not in named


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_files_are_short(path: Path) -> None:
    limit = 150 if path.parent.name == "methods" else 350
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_methods_files_are_short_on_the_whole() -> None:
    lines = [
        len(p.read_text(encoding="utf-8").splitlines())
        for p in modules()
        if p.parent.name == "methods"
    ]
    assert len(lines) == len(method_names())
    assert sum(lines) / len(lines) < 100


def test_every_method_has_rows() -> None:
    rows = {case.config.peft_type for case in [*CASES, *PROMPTS, *ROUTED, *ATTENDED]}
    assert rows == set(method_names())


def test_rows_have_names_of_their_own() -> None:
    names = [case.name for case in [*CASES, *PROMPTS, *ROUTED, *ATTENDED]]
    assert len(names) == len(set(names))
    assert len(names) >= 60


@pytest.mark.parametrize("peft_type", method_names())
def test_a_method_is_documented_with_its_source(peft_type: str) -> None:
    method = method_for(peft_type)
    module = sys.modules[method.__module__].__doc__ or ""
    assert "https://" in module
    assert method.__doc__
    assert "(" in method.__doc__


def test_public_names_exist() -> None:
    # 40 for adapters, 8 for derivatives and training, which are used where a model is written
    assert len(peft_any.__all__) <= 48
    for name in peft_any.__all__:
        assert getattr(peft_any, name) is not None
    assert peft_any.LoraConfig.peft_type == "LORA"
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        _ = peft_any.NoSuchConfig
    classes = {method_for(name).__name__ for name in method_names()}
    assert {*dir(peft_any)} >= {*peft_any.__all__, *classes, "__version__"}
    for name in ("LoRAConfig", "read_safetensor"):
        with pytest.raises(AttributeError, match=name) as caught:
            getattr(peft_any, name)
        assert (caught.value.name, caught.value.obj) == (name, peft_any)


def test_importing_loads_no_method_and_no_other_library() -> None:
    code = "import sys, peft_any, peft_any.model; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    roots = {m.split(".")[0] for m in loaded}
    heavy = LIBRARIES - {"array_api_compat"} | {"click", "rich", "transformers", "peft"}
    assert not roots & heavy
    assert not {m for m in loaded if m.startswith("peft_any.methods.")}


def test_the_metadata_says_what_the_package_is() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lowest = project["requires-python"].removeprefix(">=")
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert named[0] == lowest  # the least that is installed on is one that is tested
    assert "Typing :: Typed" in project["classifiers"]
    assert (PACKAGE / "py.typed").is_file()
    assert not any(c.startswith("License") for c in project["classifiers"])  # an expression says it
    assert all((PACKAGE.parent / name).is_file() for name in project["license-files"])
    assert project["keywords"] == sorted(project["keywords"])
