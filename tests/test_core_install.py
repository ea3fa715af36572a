"""Without extras: checkpoints can be merged, proven and described; the rest names its extra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import npt_fast as npt
from npt_fast.cli.main import app
from npt_fast.errors import EXTRAS, missing_package
from tests import core_install

ROOT = Path(__file__).parent.parent

TEXTS = ["--checkpoint", "a", "--from", "a", "--prompt", "b"]
NEEDS = {
    "train": (["train", "--train_layers", "1"], "torch", "train"),
    "serve": (["serve", "a"], "safetensors", "serve"),
    "export": (["export", "--checkpoint", "a", "--output", "o"], "safetensors", "hf"),
    "push": (["push", "a", "org/a"], "safetensors", "hf"),
    "sample": (["sample", "--output", "a.jsonl"], "torch", "train"),
    "evaluate": (["evaluate", "--checkpoint", "a"], "torch", "train"),
    "plan": (["plan", "--checkpoint", "a"], "torch", "train"),
    "trace": (["trace", "--from", "a", "--to", "b"], "torch", "hf"),
    "models": (["models", "a"], "torch", "hf"),
    "compare": (["compare", *TEXTS], "torch", "hf"),
    "sweep": (["sweep", *TEXTS], "torch", "hf"),
    "check": (["check", "facts.yaml", "--checkpoint", "a"], "torch", "hf"),
    "study": (["study", "--checkpoint", "a", "--output", "o"], "torch", "hf"),
    "interact": (["interact", "--checkpoint", "a"], "torch", "interact"),
    "bench": (["bench"], "torch", "hf"),
    "bench-host": (["bench", "--host"], "torch", "hf"),
    "kernels": (["kernels"], "torch", "kernels"),
}
CORE = ("merge", "analyze", "verify", "env")


def test_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        (re.split(r"[^\w.-]", line)[0].lower(), extra)
        for extra, lines in project["optional-dependencies"].items()
        for line in lines
        if extra not in ("all", "dev", "docs") and not line.startswith("npt_fast[")
    }
    assert declared == set(EXTRAS.items())


def test_verbs_name_their_extra_in_one_line() -> None:
    verbs = {name for name in app if not name.startswith("-")}
    assert verbs == {given[0] for given, *_ in NEEDS.values()} | {*CORE, "plot"}
    found = core_install.program(*(given for given, *_ in NEEDS.values()))
    for (given, package, extra), (code, out, err) in zip(NEEDS.values(), found, strict=True):
        assert (code, out) == (1, ""), given
        assert err == (
            f"Error: npt-fast {given[0]} needs the package {package}; "
            f"pip install 'npt_fast[{extra}]'\n"
        )


def test_checkpoints_need_no_extra(tmp_path: Path, layer11: Path) -> None:
    out = str(tmp_path / "out")
    *found, (code, _, err) = core_install.program(
        ["merge", "--checkpoints", str(layer11), "--output", out, "--verify"],
        ["analyze", "--checkpoint", out, "--verbose"],
        ["verify", out],
        ["env"],
        ["kernels", "roofline", "--model", "llama-3.2-1b"],
        ["plot", "a"],
    )
    assert [code for code, *_ in found] == [0] * 5
    assert (code, err) == (1, "Error: a picture needs matplotlib; pip install 'npt_fast[plot]'\n")


def test_names_name_their_extra() -> None:
    code = """
import json, npt_fast
found = {}
for name in (*npt_fast.__all__, "functional"):
    try:
        getattr(npt_fast, name)
    except ModuleNotFoundError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    result = core_install.python(code)
    found = json.loads(result.stdout)
    core = {name for name, home in npt._HOMES.items() if home.split(".")[1] not in (
        "hf", "training", "transfer",
    )}  # fmt: skip
    assert set(found) == {*npt.__all__, "functional"} - core - {"Study", "after", "at"}
    for name, message in found.items():
        trains = npt._HOMES.get(name, "").startswith("npt_fast.training.")
        extra = "train" if trains else "hf"
        assert re.fullmatch(
            rf"npt_fast\.{name} needs the package \w+; pip install 'npt_fast\[{extra}\]'", message
        )


def test_what_is_missing_of_our_own_stays_a_traceback(tmp_path: Path) -> None:
    for name in ("npt_fast.nothing", "nothing", None):
        assert missing_package(ModuleNotFoundError("", name=name), "x") is None
    code = (
        "import sys; sys.modules['npt_fast.checkpoint.inspect'] = None\n"
        "from npt_fast.cli.main import main; main(['analyze', '--checkpoint', 'a'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr
