"""``python -m npt_fast`` is ``npt-fast``."""

from npt_fast.cli.main import main

if __name__ == "__main__":
    main()
