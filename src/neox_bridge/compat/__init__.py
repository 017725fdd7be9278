"""The public import ``neox_bridge.compat.install``, which users have in their scripts."""

from neox_bridge.compat.install import install

__all__ = ["install"]
