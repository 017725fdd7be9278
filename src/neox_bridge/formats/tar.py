"""Recognizes a tar, the container that torch.save wrote before 0.1.10, as torch.load does."""

TAR_HEADER_BYTES = 512
_CHECKSUM = slice(148, 156)
_OCTAL = b"01234567_oO+-" + bytes(range(9, 14)) + bytes(range(28, 33))  # what int(x, 8) takes


def is_tar(head: bytes) -> bool:
    """Whether ``torch.load`` would read a file as a tar.

    head: the file's first 512 bytes. Only the header's checksum tells: V7 tars, which Python reads
    too, have no "ustar" in it. torch tries this before it reads a pickle
    (torch/serialization.py, ``_legacy_load``), so a file that is both is a tar.
    """
    field = head[_CHECKSUM]
    octal = field.partition(b"\0")[0]
    if len(head) < TAR_HEADER_BYTES or (octal.strip(_OCTAL) and field[0] not in (0x80, 0xFF)):
        return False
    import tarfile  # takes long, and few files get here

    try:
        tarfile.TarInfo.frombuf(head[:TAR_HEADER_BYTES], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True
