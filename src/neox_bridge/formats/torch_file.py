"""Opens what torch.save wrote, of any age, without torch and without running it."""

from neox_bridge.errors import BridgeError
from neox_bridge.formats.file_kinds import refuse_misplaced
from neox_bridge.formats.tar import TAR_HEADER_BYTES, is_tar
from neox_bridge.formats.torch_legacy import read_legacy
from neox_bridge.formats.torch_zip import not_whole, read_pt
from neox_bridge.stores.paths import open_file

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # a record, or the end of an archive without records
_PICKLE = b"\x80"  # PROTO, with which every pickle of protocol 2 and later begins


def read_torch(path: str, *, alike: bool = False, until: str | None = None) -> object:
    """The value of a ``.pt``, ``.pth`` or ``.bin`` file: a ``TensorRef`` in each tensor's place.

    Containers and scalars are Python's, an OrderedDict is a dict, every other object is an inert
    ``pickles.Record`` or ``pickles.Global``. alike, until: see ``read_pt``; files from before
    torch 1.6 are read as a whole. Raises BridgeError, naming the file and the way out, for whatever
    isn't such a file or can't be read.
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
