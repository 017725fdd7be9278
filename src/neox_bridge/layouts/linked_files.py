"""Which files a checkpoint may bring along: those in its folder, never another's through a link.

What small files hold goes into the output, as it is or by its values. An archive from elsewhere may
have a link named tokenizer.json or config.json that leads to a key or a password: a conversion
would put it into what is then uploaded. Weights are only ever read as tensors, and their links are
followed wherever they lead: many keep them on another disk.
"""

import os
import re

from neox_bridge.errors import BridgeError
from neox_bridge.stores.local_folder import missing_message
from neox_bridge.stores.paths import is_local, lexists

# Hugging Face's cache: snapshots/COMMIT holds links to blobs (huggingface_hub, file_download.py)
_CACHED = re.compile(r"(.*/(?:models|datasets|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?", re.DOTALL)


def check_own(path: str, *folders: str) -> None:
    """Raise BridgeError if a file lies in none of these folders once its links are followed.

    A link that leads nowhere is an error as well. For a folder of Hugging Face's cache the blobs
    beside it count too.
    """
    if not is_local(path):
        return  # stores have no links, and one that is mounted from elsewhere is its keeper's
    if os.path.islink(path) and not os.path.exists(path):
        raise BridgeError(missing_message(path))
    real = os.path.realpath(path)
    for folder in map(os.path.realpath, folders):
        cached = _CACHED.fullmatch(folder)
        # a link in place of the blobs' own folder would have been followed in ``real``
        homes = (folder, os.path.join(cached[1], "blobs")) if cached else (folder,)
        if any(real.startswith(os.path.join(home, "")) for home in homes):
            return
    raise BridgeError(
        f"{path} is a symbolic link to {real}, outside of {folders[0]}. The output would contain "
        "that file. If it belongs to this checkpoint, replace the link with a copy."
    )


def brought_along(path: str, *folders: str) -> bool:
    """Whether there is such a file, or a link of this name. Raises BridgeError as ``check_own``.

    Links that lead nowhere are files that are missing, which whoever opens them says.
    """
    if not lexists(path):
        return False
    check_own(path, *folders)
    return True
