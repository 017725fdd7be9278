"""Recognizes tar archives, which torch.save wrote before 0.1.10, as torch.load does."""

TAR_HEADER_BYTES = 512
_CHECKSUM = slice(148, 156)
_OCTAL = b"01234567_oO+-" + bytes(range(9, 14)) + bytes(range(28, 33))  # as int(x, 8) accepts


def is_tar(head: bytes) -> bool:
    """Whether ``torch.load`` would read a file as a tar archive.

    The checksum of the header decides, because V7 archives, which Python reads too, do not contain
    "ustar". PyTorch tries this before it reads a pickle (torch/serialization.py, ``_legacy_load``),
    so a file that is both is a tar archive.

    head: the first 512 bytes of the file.
    """
    field = head[_CHECKSUM]
    octal = field.partition(b"\0")[0]
    if len(head) < TAR_HEADER_BYTES or (octal.strip(_OCTAL) and field[0] not in (0x80, 0xFF)):
        return False
    import tarfile  # imported here because it is slow and few files need it

    try:
        tarfile.TarInfo.frombuf(head[:TAR_HEADER_BYTES], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True
