"""The parent of the site's process: starts it again when it dies, so that an app that crashes does not end the site.

The child holds the read end of a pipe. When the parent is killed the pipe closes, and the child ends too
(:func:`end_with_parent`): no process of a site is left behind that nobody watches.

A child says with one of three exit codes (:data:`ENDINGS`) that starting it again would not help. Whatever else it ends
with, 0 included, it is started again, after 1 s, 2 s, 4 s ... up to a minute; after a minute of life 1 s again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["ENDINGS", "end_with_parent", "supervise"]

ENDINGS: Final = {101: 1, 102: 2, 164: 64}
"""Exit code of a child that must not be started again, and the exit code of the command then."""

_GLANCE: Final = 0.1


def supervise(
    command: Sequence[str],
    stop: threading.Event,
    say: Callable[[str], None],
    *,
    first: float = 1.0,
    longest: float = 60.0,
    settled: float = 60.0,
    grace: float = 15.0,
) -> int:
    """Keep a command running until ``stop`` is set or it says that there is no use.

    Args:
        command: what to run.
        stop: ends it: the child gets SIGTERM, and SIGKILL ``grace`` seconds later.
        say: told why the child is started again.
        first: seconds before the first restart.
        longest: seconds before a restart at most.
        settled: seconds after which a child counts as having worked.
        grace: seconds for the child to end what it is doing.

    Returns:
        the exit code of the whole.
    """
    pause = first
    while True:
        began = time.monotonic()
        code = _one_life(command, stop, grace)
        if stop.is_set():
            return 0
        if code in ENDINGS:
            return ENDINGS[code]
        if time.monotonic() - began >= settled:
            pause = first
        say(f"the site's process ended ({_how(code)}); it is started again in {pause:g} s")
        if stop.wait(pause):
            return 0
        pause = min(2 * pause, longest)


def end_with_parent() -> None:
    """End this process at once when its parent ends; to be called in the child, whose standard input is the pipe."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _one_life(command: Sequence[str], stop: threading.Event, grace: float) -> int:
    # A group of its own, so that Ctrl-C reaches the parent alone, which then lets the child end in order.
    group = 0 if os.name == "posix" else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, process_group=group) as child:  # noqa: S603
        while child.poll() is None and not stop.wait(_GLANCE):
            pass
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(grace)
            except subprocess.TimeoutExpired:
                child.kill()
        return child.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
