"""A file of lines, one appended at a time, whose disk may be full."""

import os


class LogFile:
    """Keeps the bytes that the disk did not take, and writes them with the next line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._unwritten = b""

    def append(self, line: str) -> OSError | None:
        """Append a line, or return why that failed."""
        self._unwritten += f"{line}\n".encode()
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while self._unwritten:
                    count = os.write(fd, self._unwritten)
                    self._unwritten = self._unwritten[count:]
            finally:
                os.close(fd)
        except OSError as error:
            return error
        return None
