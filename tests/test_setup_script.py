"""Bytecode that `./run setup` compiles beforehand: our packages, and the modules that a run imports."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

SCRIPT = (Path(__file__).resolve().parents[1] / "run").read_text()


def test_set_up_compiles_what_a_run_imports():
    function = SCRIPT.partition("compile_bytecode() {")[2].partition("\n}\n")[0]
    code = re.search(r"-c '\n(.*?)'", function, re.DOTALL)[1]
    names = [alias.name for node in ast.parse(code).body if isinstance(node, ast.Import) for alias in node.names]
    assert {"vla.training.train", "rl.runner", "policies.serving.server", "envs.backends.cpu_vec_env"} <= set(names)
    assert [name for name in names if find_spec(name) is None] == []
    assert "-m compileall -q vla envs policies rl bascule plugins" in function
    # Before the stamp that calls the environment finished, and however the user's shell is set.
    assert 0 < SCRIPT.index("    compile_bytecode ||") < SCRIPT.index('>"$stamp.tmp"')
    assert function.count("env -u PYTHONDONTWRITEBYTECODE") == 2
