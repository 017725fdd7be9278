"""The known changes of both frameworks as data, what a target expects, diagnosis, the patcher."""

from neox_bridge.compat.install import install

__all__ = ["install"]
