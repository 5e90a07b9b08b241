"""Entry point of `tuneline`. Apart from the command line itself, so that Ctrl-C while that is imported ends with a word too."""

from __future__ import annotations

import sys

INTERRUPTED = "interrupted; run again and it goes on where it was"


def main() -> None:
    try:
        from flows.commands.runs import main as command_line

        command_line()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
