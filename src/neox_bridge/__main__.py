"""``python -m neox_bridge``: the same as ``neox-bridge``."""

from neox_bridge.cli.app import main

main()
