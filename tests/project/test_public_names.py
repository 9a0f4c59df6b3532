"""Public names and signatures equal those in public_names.txt, so that every change shows in a diff.

``python -m tests.project.test_public_names`` rewrites the file. CHANGELOG.md must then say what changed;
docs/deprecation.md has the rules for changes.
"""

import importlib
import inspect
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_names.txt")
MODULES = (
    "fastattn", "fastattn.intervals", "fastattn.nn", "fastattn.testing", "fastattn.lm.models",
    "fastattn.integrations.context_parallel", "fastattn.integrations.flash_attn",
    "fastattn.integrations.torch", "fastattn.integrations.transformers",
)  # fmt: skip


def lines_of(module_name):
    module = importlib.import_module(module_name)
    names = getattr(module, "__all__", None)
    if names is None:
        own = vars(module).items()
        names = [name for name, x in own if name[0] != "_" and getattr(x, "__module__", "") == module_name]
    for name in sorted(names):
        value = getattr(module, name)
        yield f"{module_name}.{name}{signature_of(value)}"
        if inspect.isclass(value) and value.__module__.startswith("fastattn"):
            for method, function in sorted(vars(value).items()):
                if method[0] != "_" and inspect.isfunction(function):
                    yield f"{module_name}.{name}.{method}{signature_of(function)}"


def signature_of(value):
    """Parameters by name, kind and default. Annotations may be made more exact at any time."""
    if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
        return ""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def snapshot():
    return "".join(f"{line}\n" for module in MODULES for line in lines_of(module))


def test_public_names_and_signatures_are_those_of_the_snapshot():
    before, now = SNAPSHOT.read_text(encoding="utf-8").splitlines(), snapshot().splitlines()
    gone, new = [x for x in before if x not in now], [x for x in now if x not in before]
    todo = "run `python -m tests.project.test_public_names`, and say it in CHANGELOG.md (docs/deprecation.md)"
    assert (gone, new) == ([], []), todo


def test_the_snapshot_holds_what_users_call():
    text = SNAPSHOT.read_text(encoding="utf-8")
    for name in ("fastattn.attention(q, k, v, *, causal=False", "fastattn.nn.KVCache", "fastattn.MultiHeadAttention("):
        assert name in text, name
    assert " at 0x" not in text, "a default without a stable text"


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
