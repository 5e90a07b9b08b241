"""Entry point of `tuneline`. Puts PACKAGES_ROOT first on the path before it imports the command line: other packages named `flows`
and `tasks` may be installed or in a folder of PYTHONPATH."""

from __future__ import annotations

import sys
from importlib import import_module

from tuneline.paths import PACKAGES_ROOT


def main() -> None:
    sys.path.insert(0, str(PACKAGES_ROOT))
    import_module("flows.__main__").main()  # by name: no module of the core depends on flows


if __name__ == "__main__":
    main()
