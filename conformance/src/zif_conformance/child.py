"""One child of a run: pytest over a part of the suite, ended with its parent. `python -m zif_conformance.child`.

Started by `zif_conformance.processes`. What happens is said on a descriptor by `zif_conformance.recording`.
"""

import os
import sys
import threading
from collections.abc import Sequence

_EXIT_ORPHANED = 3


def main(arguments: Sequence[str]) -> int:
    """Run pytest with all arguments but the first, the descriptor whose end of file means that the parent is gone."""
    lifeline, *pytest_arguments = arguments
    watch_parent(int(lifeline))
    import pytest

    return int(pytest.main(pytest_arguments))


def watch_parent(descriptor: int) -> None:
    """End this process when the other end of the pipe is closed, even by SIGKILL of the parent."""
    os.set_inheritable(descriptor, False)

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(_EXIT_ORPHANED)

    threading.Thread(target=wait, daemon=True, name="parent-watch").start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
