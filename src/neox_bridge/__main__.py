"""``python -m neox_bridge``, the same as ``neox-bridge``."""

import gc


def main() -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    gc.set_threshold(50_000)  # modules and headers are many objects and no garbage
    from neox_bridge.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
