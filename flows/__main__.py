"""Entry point of `tuneline`, apart from the command line itself: Ctrl-C during its import ends with a message too."""

from __future__ import annotations

import sys

INTERRUPTED = "interrupted; run again to resume"


def main() -> None:
    try:
        from flows.commands.runs import main as command_line

        command_line()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
