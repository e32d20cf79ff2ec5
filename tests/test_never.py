"""What ruff's S rules do not say of the packages and scripts: no unpickling by torch, numpy or others, no code that a
model brings, no archive unpacked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("diffpo", "samplers", "scripts") for path in (ROOT / name).rglob("*.py"))

CALLS = {"compile", "__import__"}  # the built-in ones: ruff names eval and exec only
METHODS = {"extractall", "extract", "unpack_archive", "unsafe_load", "full_load"}  # of archives and of yaml
MODULES = {"joblib", "cloudpickle"}  # pickle by other names
OPTIONS = {"trust_remote_code": "False", "allow_pickle": "False"}  # what they may be, if they are given


def offences(source: str) -> list[str]:
    """The forbidden imports, calls and options in a file's text, as they are written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name == "torch.load"]  # which the line of its call would not show
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            if name in CALLS or name.rpartition(".")[2] in METHODS:
                found.append(name)
            if name in ("torch.load", "torch.jit.load") and options.get("weights_only") != "True":
                found.append(f"{name} without weights_only=True")
            found += [f"{key}={options[key]}" for key, right in OPTIONS.items() if options.get(key, right) != right]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_unpacked_or_run(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(path)", "torch.load(path, weights_only=False)", "from torch import load", "torch.jit.load(path)"),
        *("import joblib", "from cloudpickle import loads", "np.load(path, allow_pickle=True)", "__import__(text)"),
        *("AutoModel.from_pretrained(x, trust_remote_code=True)", "archive.extractall(folder)", "archive.extract(m)"),
        *("shutil.unpack_archive(a, b)", "yaml.unsafe_load(text)", "compile(text, 'name', 'exec')"),
    ],
)
def test_a_forbidden_line_is_found(line):
    assert offences(line)


def test_allowed_lines_are_not_found():
    allowed = "model.eval()\ntorch.load(p, weights_only=True)\nre.compile(x)\ntorch.compile(m)\nplan.load(p)\n"
    assert offences(allowed + "from torch import save\nnp.load(p, allow_pickle=False)") == []


def test_configs_are_read_by_a_safe_loader():
    import yaml

    from diffpo.config.reader import Loader

    assert issubclass(Loader, yaml.SafeLoader)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader)  # noqa: S506
