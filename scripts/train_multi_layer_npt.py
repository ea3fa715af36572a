"""The original's script: it runs ``npt-fast train`` of this checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from npt_fast.cli.scripts import run

    run("train")
