"""stdout and stderr that survive their reader: `tuneline run ... | head` must not end a run once `head` exits, and a run whose
terminal was closed shuts down gracefully."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO


class BrokenPipeSafe:
    """Wraps a stream: discards output that has no reader any more, and escapes characters that its encoding lacks."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:  # a pipe under LANG=C may take only ASCII; a file name may be invalid Unicode
            return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):  # errors of a closed pipe and a closed terminal
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # discards buffered output too, and that of children
        os.close(nothing)
