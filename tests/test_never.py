"""What no line of the packages and scripts does: unpickle, run text or a model's own code, unpack an archive."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for name in ("diffpo", "samplers", "scripts") for path in (ROOT / name).rglob("*.py"))

RUNS_TEXT = {"eval", "exec", "compile", "__import__"}  # the built-in ones
UNPACKS = {"extractall", "extract", "unpack_archive"}  # writes what an archive names
UNPICKLES = {"unsafe_load", "full_load", "read_pickle", "Unpickler"}
PICKLE_MODULES = {"marshal", "shelve", "dill", "joblib", "cloudpickle"}


def name_of(function: ast.expr) -> str:
    """torch.load, eval, archive.extractall, ... as it is written."""
    return ast.unparse(function)


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import of {module}" for module in modules if module.split(".")[0] in PICKLE_MODULES]
            if modules == ["pickle"] and isinstance(node, ast.ImportFrom):
                found += [f"pickle.{name}" for name in names if name not in ("UnpicklingError", "PicklingError")]
            if modules == ["torch"] and "load" in names:
                found.append("torch.load under another name")
        if not isinstance(node, ast.Call):
            continue
        name, options = name_of(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        last = name.rpartition(".")[2]
        if name in RUNS_TEXT or last in UNPACKS or last in UNPICKLES or name.startswith("pickle."):
            found.append(name)
        if name in ("torch.load", "torch.jit.load") and options.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if name == "yaml.load" and ast.unparse(node).rpartition("(")[2].rpartition(")")[0].split(", ")[-1] != "Loader":
            found.append("yaml.load with another loader")
        for option, allowed in {"trust_remote_code": "False", "allow_pickle": "False", "shell": "False"}.items():
            if options.get(option, allowed) != allowed:
                found.append(f"{option}={options[option]}")
        if name == "os.system":
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_unpickled_unpacked_or_run(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        *("torch.load(path)", "torch.load(path, weights_only=False)", "from torch import load", "pickle.load(file)"),
        *("from pickle import loads", "pickle.Unpickler(file)", "import joblib", "np.load(path, allow_pickle=True)"),
        *("AutoModel.from_pretrained(x, trust_remote_code=True)", "archive.extractall(folder)", "archive.extract(m)"),
        *("shutil.unpack_archive(a, b)", "eval(text)", "exec(text)", "yaml.load(text, yaml.Loader)", "os.system(text)"),
        *("yaml.unsafe_load(text)", "subprocess.run(text, shell=True)", "torch.jit.load(path)"),
    ],
)
def test_the_look_would_meet(line):
    assert offences(line)


def test_the_look_lets_pass():
    allowed = "model.eval()\ntorch.load(p, weights_only=True)\nre.compile(x)\ntorch.compile(m)\nyaml.load(t, Loader)\n"
    assert offences(allowed + "import pickle\nfrom pickle import UnpicklingError\nplan.load(p)") == []


def test_configs_are_read_by_a_safe_loader():
    import yaml

    from diffpo.config.reader import Loader

    assert issubclass(Loader, yaml.SafeLoader)
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader)
