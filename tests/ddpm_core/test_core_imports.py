import ast
import sys
from pathlib import Path

import ddpm_core


def test_the_science_imports_torch_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "ddpm_core"}
    files = list(Path(ddpm_core.__file__).parent.glob("**/*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, file


def test_public_names_exist() -> None:
    assert all(hasattr(ddpm_core, name) for name in ddpm_core.__all__)
