"""An environment that has Flower, and PyTorch and ExecuTorch from the environment that runs this: nothing heavy twice.

    python integrations/flower/environment.py [FOLDER]      prints FOLDER, build/flower-env if it is not given

Flower's own typer, rich and protobuf come first in it; what it lacks is found in the other one, by a `.pth` file, which
also names this checkout. It is for developers of this package; users install both packages into one environment
(README).
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLOWER = "flwr[simulation]==1.42.*"


def make_environment(folder: Path) -> Path:
    """The environment's Python, made if there is none.

    Args:
        folder: Where it is, or will be.

    Raises:
        CalledProcessError: Flower could not be installed; a package index is needed once.
    """
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, FLOWER], check=True)
        ready.touch()
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    lines = [str(ROOT), str(HERE), sysconfig.get_paths()["purelib"]]
    (site / "beside.pth").write_text("\n".join(lines) + "\n")
    return python


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "flower-env"
    make_environment(target)
    print(target)
