"""The floors: a package imports only from those below it, and heavy libraries only where they belong."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dcnv3", "data_pipeline", "pretrain", "launch")

# From the bottom up; a module may import from its own entry and from those before it.
FLOORS = [
    ["dcnv3"],
    ["data_pipeline.errors", "data_pipeline.callbacks", "data_pipeline.hashing", "data_pipeline.lazy"],
    ["data_pipeline.durable"],
    ["data_pipeline.format", "data_pipeline.executors"],
    ["data_pipeline.preparation", "data_pipeline.reading"],
    ["data_pipeline.curation"],
    ["pretrain.configuration"],
    ["pretrain.models"],
    ["pretrain.objectives"],
    ["pretrain.tasks"],
    ["pretrain.training"],
    ["pretrain.handoff"],
    ["pretrain.analysis"],
    ["pretrain.evaluation"],
    ["pretrain.tasks.pretraining", "pretrain.tasks.classification", "pretrain.tasks.detection"],
    ["pretrain.tasks.segmentation"],
    ["pretrain.finetuning", "pretrain.report"],
    ["pretrain.demo", "pretrain.studies"],
    ["launch"],
]
FORBIDDEN = {
    "dcnv3": {"data_pipeline", "pretrain", "launch"},
    "data_pipeline": {"deepspeed", "open_clip", "timm", "dcnv3"},
    "data_pipeline.format": {"torch"},
    "data_pipeline.preparation": {"torch", "torchvision"},
    "data_pipeline.curation": {"torch", "torchvision"},
    "pretrain.configuration": {"torch", "deepspeed", "open_clip"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, module: str) -> set[str]:
    """Every module that `path` imports anywhere, relative imports resolved, type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for stmt in node.body for inner in ast.walk(stmt))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def room_of(module: str) -> str | None:
    """The room that a module stands in: of nested rooms, the innermost."""
    rooms = [name for names in FLOORS for name in names if module == name or module.startswith(name + ".")]
    return max(rooms, key=len, default=None)


def floor_of(module: str) -> int | None:
    room = room_of(module)
    return next((height for height, names in enumerate(FLOORS) if room in names), None)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_its_own_floor_and_lower_ones(module: str) -> None:
    height = floor_of(module)
    if height is None:  # the package's own __init__, or a new room that FLOORS must learn of
        assert module in PACKAGES, f"{module} stands on no floor: add its room to FLOORS"
        return
    for imported in imports(modules()[module], module):
        other = floor_of(imported)
        if other is None:
            continue
        beside = other == height and room_of(imported) != room_of(module)
        assert other <= height and not beside, f"{module} imports {imported} from a floor above or beside it"


def names_in(path: Path) -> set[str]:
    """What a module defines or imports anywhere, in blocks and functions too, and what its `__getattr__` gives."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.List) and path.name == "__init__.py":  # __all__
            found.update(str(item.value) for item in node.elts if isinstance(item, ast.Constant))
    return found


def test_every_module_and_name_that_is_imported_exists() -> None:
    """mypy takes a module of ours that is gone for a third party's, and looks at no test and no benchmark."""
    known = modules()
    names = {module: names_in(path) for module, path in known.items()}
    files = [*known.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            if node.module.split(".")[0] not in PACKAGES:
                continue
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                module = inside in known or (ROOT / inside.replace(".", "/")).is_dir()
                assert module or alias.name in names.get(node.module, ()), f"{path.relative_to(ROOT)} imports {inside}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too: they hide a circle, and do not open it."""
    known = modules()

    def home(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    graph = {module: {home(name) for name in imports(path, module)} - {"", module} for module, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


TYPED = ("pretrain.training", "pretrain.tasks")


def test_no_signature_says_any_but_for_json() -> None:
    """`dict[str, Any]` is JSON. What a third party leaves without types has a name of its own, as DeepSpeedEngine."""
    found = []
    for module, path in modules().items():
        if not module.startswith(TYPED):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                rest = (node.args.vararg, node.args.kwarg)
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, rest)]
                annotations = [node.returns, *(argument.annotation for argument in arguments)]
                texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
                plain = [re.sub(r"(dict|Mapping)\[str, Any\]", "", text) for text in texts]
                found += [f"{module}.{node.name}: {text}" for text in plain if re.search(r"\bAny\b", text)]
    assert not found, found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_without_the_libraries_it_must_not_need(room: str) -> None:
    for module, path in modules().items():
        if module == room or module.startswith(room + "."):
            roots = {name.split(".")[0] for name in imports(path, module)}
            assert not roots & FORBIDDEN[room], f"{module} imports {sorted(roots & FORBIDDEN[room])}"


def test_the_operator_imports_nothing_but_torch_and_the_standard_library() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "dcnv3", "triton"}
    for module, path in modules().items():
        if module.split(".")[0] == "dcnv3":
            roots = {name.split(".")[0] for name in imports(path, module)}
            assert roots <= allowed, f"{module} imports {sorted(roots - allowed)}"


@pytest.mark.parametrize(
    "package",
    [
        "data_pipeline.preparation",
        "data_pipeline.curation.filters",
        "data_pipeline.format",
        "pretrain.configuration",
        "launch.cli",
    ],
)
def test_importing_it_does_not_load_torch(package: str) -> None:
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_no_file_is_longer_than_about_four_hundred_lines() -> None:
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h", ".yaml", ".md"}
    folders = (*PACKAGES, "tests", "benchmarks", "configs", "docs")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > 420}
    assert not long, f"split these: {long}"
