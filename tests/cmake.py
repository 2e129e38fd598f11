"""Targets of CMakeLists.txt, built for tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def build(folder: Path, target: str, sanitize: str = "", **options: object) -> Path:
    """Builds one target in `folder`, with sanitizers such as "address,undefined"; returns `folder`."""
    options |= {"DTOKD_SANITIZE": sanitize, "Python_EXECUTABLE": sys.executable}
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
    for command in (configure, ["cmake", "--build", folder, "--target", target]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder


def load(folder: Path, name: str) -> ModuleType:
    """The Python module that the target `name` built in `folder`."""
    library = next(folder.glob(f"{name}*.so"))
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
