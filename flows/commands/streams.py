"""stdout and stderr that outlive their reader: `tuneline run ... | head` must not end a run once `head` has seen enough, and a run
whose terminal was closed ends in order."""

from __future__ import annotations

import errno
import os
from typing import Any, TextIO


class BrokenPipeSafe:
    """A stream as it is, but what nobody reads any more is dropped, and what its encoding does not have is written as an escape."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError as error:  # a pipe under LANG=C may take ASCII alone; the name of a file may be no Unicode
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
        if error.errno not in (errno.EPIPE, errno.EIO):  # what a closed pipe and a closed terminal answer
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())  # also for what is still buffered, and for children
        os.close(nothing)
