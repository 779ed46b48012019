"""Safe reading of the files that a table names: only regular files, up to a size limit."""

import os
import stat

from mmpretrain.data.decode import BadSample


def read_file(path: str | os.PathLike[str], max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Read a regular file; return its bytes and its state when it was opened. It reads at most `max_bytes` + 1 bytes.

    Raises: BadSample, with the reason, if the file is missing, not regular, larger than `max_bytes`, or unreadable.
    """
    try:
        kind = os.stat(path).st_mode  # before opening, which has side effects on a device
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
            raise BadSample(f"{what}, expected a regular file")
        # Non-blocking, in case the file has become a pipe meanwhile: opening it must not wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())
            data = b"" if state.st_size > max_bytes else file.read(state.st_size + 1)
            if len(data) > state.st_size:  # the file grows, or reports no size, as in /proc
                data += file.read(max_bytes + 1 - len(data))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("no such file") from error
    except OSError as error:
        raise BadSample(f"the file cannot be read ({error.strerror or error})") from error
    except BadSample:
        raise
    except ValueError as error:  # its name contains a NUL byte or a lone surrogate
        raise BadSample(f"no such file ({error})") from error
    if (num_bytes := max(state.st_size, len(data))) > max_bytes:
        raise BadSample(f"{num_bytes} bytes, more than the limit of {max_bytes}")
    return data, state
