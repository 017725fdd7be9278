"""What goes wrong, as one exception with the exit code that the command line gives it."""


class BridgeError(Exception):
    """Something a user can mend: says what was wrong, in which file or key, and what to do now."""

    exit_code = 1


class Unreachable(BridgeError):
    """A store doesn't answer, or not as it should: what is finished waits for the next try."""


class Unverified(BridgeError):
    """What was written isn't what the source says: a fault of a disk, of memory or of this tool."""

    exit_code = 3


class Refused(BridgeError):
    """The target can't express the source, or a layout doesn't fit: nothing was written."""

    exit_code = 4
