"""``python -m neox_bridge``, the same as ``neox-bridge``."""

import gc
import os


def main() -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    gc.set_threshold(50_000)  # modules and headers are many objects and no garbage
    # numpy's matrix products aren't used, and its threads for them spin when they start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from neox_bridge.cli.app import main as run

    try:
        run()
    finally:
        gc.freeze()  # nothing to look through at the end, which takes longer than all else there


if __name__ == "__main__":
    main()
