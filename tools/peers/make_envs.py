"""Creates a virtual environment for each peer, with the torch version of this project.

    python -m tools.peers.make_envs build/peers

Each peer needs its own environment, because their requirements conflict. Environments that exist are left as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE.parent.parent / "constraints.txt"
PEERS = ("modelopt", "llmcompressor", "autoround")


def make_env(folder: Path, peer: str) -> None:
    """Creates the environment of a peer, unless it is complete, which a marker file says that is written last."""
    requirements, marker = HERE / f"{peer}.txt", folder / ".installed"
    if marker.exists() and marker.read_text() == requirements.read_text():
        return
    venv.create(folder, with_pip=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--constraint", CONSTRAINTS, "--requirement", requirements, "torch"], check=True)
    marker.write_text(requirements.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    arguments = parser.parse_args()
    for name in arguments.peers:
        print(name, flush=True)
        make_env(arguments.folder / name, name)
