"""Stopping a run from outside: the first signal asks, a Ctrl-C after it insists."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_NOTICE = b"\nstopping after this step; press Ctrl-C again to stop at once\n"


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that a loop can poll.

    ```
    with StopRequest() as stop:
        while not stop.requested:
            step()
    ```

    A SIGINT after another signal raises `KeyboardInterrupt` where the program stands.
    The handlers found at the start come back at the end. Outside the main thread, where
    Python allows no handlers, nothing is installed and the flag stays False.

    Attributes:
      requested: whether a signal has come.
      signal: the first one (`signal.SIGTERM` or `signal.SIGINT`), or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number)
            # print() may be what was interrupted, and it is not reentrant.
            with contextlib.suppress(OSError):
                os.write(2, _NOTICE)
