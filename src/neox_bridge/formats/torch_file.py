"""Opens files that any version of torch.save wrote, without PyTorch and without running them."""

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import refuse_misplaced
from neox_bridge.formats.tar import TAR_HEADER_BYTES, is_tar
from neox_bridge.formats.torch_legacy import read_legacy
from neox_bridge.formats.torch_zip import not_whole, read_pt
from neox_bridge.stores.paths import open_file

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # a record, or the end of an empty archive
_PICKLE = b"\x80"  # PROTO, with which every pickle of protocol 2 and later begins


def read_torch(path: str, *, alike: bool = False, until: str | None = None) -> object:
    """The value of a ``.pt``, ``.pth`` or ``.bin`` file, with a ``TensorRef`` for each tensor.

    Containers and scalars are values of Python, an OrderedDict is a dict, and every other object is
    an inert ``pickles.Record`` or ``pickles.Global``.

    Args:
        alike: See ``read_pt``.
        until: See ``read_pt``. Files from before PyTorch 1.6 are read completely.

    Raises:
        BridgeError: The file is of another kind or cannot be read. The message has the way out.
    """
    try:
        with open_file(path) as file:
            head = file.read(TAR_HEADER_BYTES)
        if is_tar(head):
            raise BridgeError(
                f"{path} is a tar archive, as PyTorch saved before 0.1.10. Load it with "
                "torch.load and save it again with torch.save."
            )
        if head.startswith(_ZIP):
            return read_pt(path, alike=alike, until=until)
        if head.startswith(_PICKLE):
            return read_legacy(path)
    except OSError as error:
        raise BridgeError(f"{path} cannot be read: {error.strerror}. Check the disk.") from None
    refuse_misplaced(path, head)
    if not head.strip(b"\0"):
        raise not_whole(path, "it is empty" if not head else "it starts with zeros")
    raise not_whole(path, f"it starts with {head[:4]!r}, unlike any PyTorch file")
