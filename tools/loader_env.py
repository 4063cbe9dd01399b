"""A virtual environment for the peers of the loader benchmark, made when it is first needed.

The peers want an older numpy and transformers than this project, and pull in clients of every
cloud. So they are installed without dependencies, from a list that has what they import when they
read local files; torch, and whatever the list leaves out, comes from the environment that this
program runs in.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements-loaders.txt")
TIMEOUT_S = 600.0


class PeersError(Exception):
    """The peers can't be installed; says why."""


def peers_python(folder: Path) -> str:
    """Return the interpreter of the peers' environment, which is made unless it is there.

    Raises:
        PeersError: it can't be made.
    """
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    parent = sysconfig.get_path("purelib")
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + parent.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    try:
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run(
            [*command, "--requirement", str(REQUIREMENTS)],
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "no message").strip().splitlines()
        raise PeersError(f"pip install failed: {lines[-1]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeersError(f"{folder} can't be made: {error}") from None
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Written last: pip would take what lies there for its own.
    (folder / "lib" / version / "site-packages" / "parent.pth").write_text(f"{parent}\n")
    stamp.write_text(wanted)
    return str(python)
