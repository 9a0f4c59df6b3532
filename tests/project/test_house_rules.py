"""The house rules that a machine can check: directions of imports, sizes, banned names and words."""

import ast
import functools
import graphlib
import importlib
import inspect
import re
from pathlib import Path

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent
ROOT = PACKAGE.parent
HERE = Path(__file__).resolve()
ARCHITECTURE = ROOT / "docs" / "architecture.md"

MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_POSITIONAL = 500, 60, 120, 8
# These stand in for functions of torch and flash-attn, so their parameters are those of what they replace.
STAND_INS = {
    "MultiHeadAttention.__init__", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func",
    "flash_attn_with_kvcache", "flash_attn_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func", "_flash_forward", "_flash_backward", "_varlen_forward",
    "_varlen_backward",
}  # fmt: skip
CODE = {".py", ".cu", ".cuh", ".cpp", ".c", ".h", ".hpp"}

# The parts of the package and what each may import of it, "" being the public names. docs/architecture.md shows it.
VOCABULARY = {
    "compiled", "errors", "files", "kv_cache", "layout", "nested", "numerics", "problem", "quantized", "rng", "rotary",
    "spec", "state", "storage", "torch_internals", "trees", "version",
}  # fmt: skip
CORE = VOCABULARY | {
    "arguments", "autograd", "decoding", "dispatch", "flops", "fp8", "functional", "inspection", "intervals", "ops",
    "plain", "plan", "reference", "serving", "statistics", "vmap", "weights",
}  # fmt: skip
PUBLIC = {"", "errors", "files", "nn", "testing", "version"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "spec": set(),
    "trees": {"errors", "spec"},
    "rotary": set(),
    "nested": {"torch_internals"},
    "state": set(),
    "storage": {"errors"},
    "torch_internals": set(),
    "numerics": {"torch_internals"},
    "files": {"errors"},
    "compiled": {"files"},
    "layout": {"errors"},
    "rng": {"spec"},
    "problem": {"errors", "layout", "spec"},
    "kv_cache": {"errors", "layout", "numerics", "problem", "rotary", "spec", "trees"},
    "quantized": {"errors", "kv_cache", "layout"},
    "reference": {"kv_cache", "numerics", "problem", "quantized", "rng", "spec", "trees"},
    "backends": VOCABULARY | {"evidence", "reference"},  # the reference for eager alone, as another test holds
    "evidence": {"compiled", "files", "problem", "state", "version"},
    "plan": {"backends", "state", "storage", "torch_internals"},
    "arguments": VOCABULARY | {"nested", "torch_internals"},
    "dispatch": {"backends", "errors", "problem", "state"},
    "ops": VOCABULARY | {"backends", "dispatch", "plan", "reference"},
    "flops": {"kv_cache", "ops", "problem", "spec"},
    "vmap": {"problem"},
    "statistics": {"ops", "problem", "reference", "spec", "torch_internals"},
    "autograd": {"backends", "errors", "ops", "plan", "problem", "reference", "spec", "torch_internals", "vmap"},
    "plain": {"problem", "reference", "spec", "torch_internals"},
    "serving": VOCABULARY | {"arguments", "autograd", "backends", "dispatch", "ops", "plain", "plan"},
    "functional": VOCABULARY
    | {"arguments", "autograd", "dispatch", "ops", "plan", "reference", "serving", "statistics"},
    "fp8": VOCABULARY | {"arguments", "dispatch", "functional", "ops"},
    "decoding": VOCABULARY | {"arguments", "dispatch", "plan", "serving"},
    "weights": VOCABULARY | {"arguments", "autograd", "backends", "dispatch", "ops", "plan", "reference", "serving"},
    "inspection": VOCABULARY | {"arguments", "dispatch", "reference", "statistics", "weights"},
    "intervals": {"errors", "problem", "spec"},
    "nn": {
        "arguments",
        "decoding",
        "dispatch",
        "errors",
        "functional",
        "inspection",
        "nested",
        "ops",
        "rng",
        "rotary",
        "spec",
        "state",
        "torch_internals",
        "trees",
        "weights",
    },
    "integrations": CORE | {"", "backends", "nn"},
    "__init__": {
        "decoding",
        "dispatch",
        "errors",
        "flops",
        "fp8",
        "functional",
        "inspection",
        "intervals",
        "nn",
        "ops",
        "quantized",
        "version",
    },
    "testing": VOCABULARY | {"backends", "decoding", "dispatch", "evidence", "functional", "nn", "reference"},
    "measure": VOCABULARY | {"", "backends", "flops", "reference", "testing"},
    "lm": PUBLIC | {"integrations", "nn"},
    "cli": PUBLIC | {"backends", "compiled", "evidence", "lm", "measure"},
}


def tracked(*folders, suffixes=CODE):
    """Files of ours below folders of the repository; a folder that is not there yet has none."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    hidden = {"__pycache__", ".venv", "build"}
    return sorted(path for path in found if not hidden & set(path.relative_to(ROOT).parts))


PYTHON = [path for path in tracked("fastattn", "tests", "benchmarks") if path.suffix == ".py"]
SOURCES = tracked("fastattn", "tests", "benchmarks", "csrc")


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(path):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports_of(path):
    """Dotted names below ``fastattn`` that a file imports, "" for the public names themselves."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fastattn":
                    yield alias.name.removeprefix("fastattn").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            if node.module == "fastattn":
                yield from (alias.name if is_module(alias.name) else "" for alias in node.names)
            elif node.module and node.module.startswith("fastattn."):
                inside = node.module.removeprefix("fastattn.")
                folder = inside.replace(".", "/")
                yield from (f"{inside}.{a.name}" if is_module(f"{folder}/{a.name}") else inside for a in node.names)


def is_module(name):
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


def test_there_is_something_to_hold():
    assert len(PYTHON) > 25 and HERE in PYTHON


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_go_one_way(part):
    paths = (
        [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else tracked(f"fastattn/{part}", suffixes={".py"})
    )
    allowed = MAY_IMPORT[part] | ({part} if part != "__init__" else set())
    for path in paths:
        for imported in imports_of(path):
            assert imported.split(".")[0] in allowed, f"{name_of(path)} must not import fastattn.{imported}"


def test_every_part_of_the_package_has_its_rule():
    parts = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__pycache__", "__main__"} == set(MAY_IMPORT)


def import_table():
    """The rules as docs/architecture.md shows them: the sets of parts by name, then a line for each part."""
    sets = {"core": CORE, "vocabulary": VOCABULARY, "public names": PUBLIC}
    lines = [*(f"- **{name}**: {code_names(members)}" for name, members in sets.items()), ""]
    lines += ["| part | may import |", "| --- | --- |"]
    for part, allowed in MAY_IMPORT.items():
        words = []
        for name, members in sets.items():
            if members <= allowed:
                words.append(name)
                allowed = allowed - members
        words += filter(None, [code_names(allowed)])
        lines.append(f"| `{part}` | {', '.join(words) or 'nothing'} |")
    return "\n".join(lines)


def code_names(parts):
    return ", ".join(f"`{part or 'fastattn'}`" for part in sorted(parts))


def with_import_table(page):
    """The text of docs/architecture.md with the table between its two marks."""
    before, _, rest = page.partition("<!-- imports -->\n")
    return f"{before}<!-- imports -->\n{import_table()}\n<!-- /imports -->{rest.partition('<!-- /imports -->')[2]}"


def test_the_architecture_page_draws_modules_that_exist():
    drawing = ARCHITECTURE.read_text(encoding="utf-8").partition("```{layers}")[2].partition("```")[0]
    names = re.findall(r"[:;] (\w+)(?= =)", drawing.partition("\n")[2])
    assert len(names) > 20 and all(is_module(name) or is_module(f"backends/{name}") for name in names), names


def test_the_architecture_page_shows_the_import_table():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert text == with_import_table(text), "run `make tables`"


def test_no_module_imports_itself_through_others():
    """Imports inside functions count: a circle that is loaded late is a circle."""
    imports = {module_of(path): set(imports_of(path)) for path in tracked("fastattn", suffixes={".py"})}
    order = graphlib.TopologicalSorter({module: found - {module} for module, found in imports.items()})
    order.prepare()  # raises CycleError, which names the modules of a circle


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def test_backends_know_nothing_of_each_other():
    lower = VOCABULARY | {"evidence", "backends.base", "backends.driver", "backends.native"}
    for path in tracked("fastattn/backends"):
        inside = path.relative_to(PACKAGE / "backends").parts
        own = f"backends.{inside[0]}" if len(inside) > 1 else "backends"
        for imported in imports_of(path):
            is_reference_of_eager = own == "backends.eager" and imported == "reference"
            is_own = imported == own or imported.startswith(f"{own}.")
            assert imported in lower or is_own or is_reference_of_eager, f"{name_of(path)} imports fastattn.{imported}"


def test_benchmarks_use_the_package_as_its_users_do():
    """For the masks of what they compare with they read the spec, and for kernels the tools of Triton and CUDA."""
    for path in tracked("benchmarks", suffixes={".py"}):
        for imported in imports_of(path):
            is_tool = imported.startswith(("backends.triton.tools", "backends.cuda.tools"))
            allowed = PUBLIC | {"inspection", "integrations", "lm", "measure", "spec"}
            assert is_tool or imported.split(".")[0] in allowed, f"{name_of(path)} imports {imported}"


def test_importing_the_package_imports_no_kernel():
    imported = set(imports_of(PACKAGE / "__init__.py"))
    assert not any(name.startswith("backends") for name in imported)


def test_files_are_short():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: count for name, count in lines.items() if count > MAX_FILE} == {}


def test_functions_are_short():
    assert [fault for path in PYTHON for node in functions_of(path) for fault in faults_of(path, node)] == []


def faults_of(path, node):
    """What is too long in a function, its body or its signature."""
    is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    if (lines := body_lines(node)) > (MAX_KERNEL if is_kernel else MAX_FUNCTION):
        yield f"{name_of(path)}: {node.name} has {lines} lines"
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
    if not is_kernel and count > MAX_POSITIONAL and not is_stand_in(path, node):
        yield f"{name_of(path)}: {node.name} has {count} parameters"


def is_stand_in(path, function):
    classes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
    owner = next((f"{c.name}." for c in classes if c.lineno < function.lineno <= c.end_lineno), "")
    return f"{owner}{function.name}" in STAND_INS


def body_lines(node):
    """Lines of the body, apart from the docstring; a signature may be as long as the problem is."""
    body = node.body
    if ast.get_docstring(node, clean=False) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_nothing_banned():
    for path in (path for path in PYTHON if path != HERE):
        text, name = path.read_text(encoding="utf-8"), name_of(path)
        assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py"), name
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text), name
        assert "make_block_ptr" not in text, f"{name}: gone in Triton 3.9: use tensor descriptors or pointers"
        has_path = re.search(r"[\"'](/home/|/root/|/Users/|/work/|/opt/|/mnt/|[A-Z]:\\\\)", text)
        assert not has_path, f"{name}: an absolute path"


def test_nothing_banned_in_kernels():
    for path in (path for path in SOURCES if path.suffix != ".py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text), name_of(path)
        is_of_torch = "simulated" in path.parts  # devices for torch are made of its own headers
        needs_torch = re.search(r"#include\s*[<\"](torch|ATen|c10)/", text)
        assert is_of_torch or not needs_torch, f"{name_of(path)}: built without torch"


def public_callables():
    for module_name in ("fastattn", "fastattn.nn", "fastattn.lm.models", "fastattn.testing"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            continue
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
                yield f"{module_name}.{name}", value


def test_public_names_are_documented_and_have_no_kwargs():
    """``**misnamed: Never`` takes nothing: it is there to answer in words."""
    for name, value in public_callables():
        assert inspect.getdoc(value), f"{name} has no docstring"
        any_names = [it for it in inspect.signature(value).parameters.values() if it.kind is it.VAR_KEYWORD]
        assert all(it.annotation == "Never" for it in any_names), f"{name} takes **kwargs"


def test_modules_say_what_lives_in_them():
    modules = [path for path in PYTHON if path.is_relative_to(PACKAGE) and path.read_text(encoding="utf-8").strip()]
    assert [name_of(path) for path in modules if not ast.get_docstring(tree_of(path))] == []


def test_tests_mirror_the_package():
    """tests/<part>/ tests fastattn/<part>/; core/ tests the modules that lie in fastattn/ itself."""
    others = {"core", "gpu", "benchmarks", "docs", "project"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [str(f) for f in folders if f.parts[0] not in others and not (PACKAGE / f / "__init__.py").exists()] == []


def test_make_runs_every_test_that_needs_a_gpu():
    """It names their folders and files, since others import what a machine with a GPU may not have."""
    lines = [line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "$(GPU_PYTEST)" in line]
    named = {ROOT / word for line in lines for word in line.split() if word.startswith("tests")}
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text("utf-8")]
    assert marked and all(path.exists() for path in named)
    assert [path for path in marked if not named & {path, *path.parents}] == []


if __name__ == "__main__":  # make tables
    ARCHITECTURE.write_text(with_import_table(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
