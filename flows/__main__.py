"""Entry point of `tuneline`, apart from the command line itself: Ctrl-C during its import ends with a message too."""

from __future__ import annotations

import sys

from flows.commands.exits import EXIT, INTERRUPTED


def main() -> None:
    try:
        from flows.commands.main import main as command_line

        command_line()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(EXIT["cancelled"])


if __name__ == "__main__":
    main()
