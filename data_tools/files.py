"""Files that a table names, read without trust in what they are."""

import os
import stat

from mmpretrain.data.decode import BadSample


def read_file(path: str | os.PathLike[str], max_bytes: int) -> tuple[bytes, os.stat_result]:
    """A regular file's bytes, and its state when it was opened; no more than `max_bytes` are ever read.

    Raises: BadSample, with the reason, where there is no such file, it is no regular file or too large, or it cannot
        be read.
    """
    try:
        kind = os.stat(path).st_mode  # before it is opened, which has effects on a device
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe, a socket or a device"
            raise BadSample(f"{what}, expected a regular file")
        # Non-blocking: should it have become a pipe meanwhile, nobody need write into it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            state = os.fstat(file.fileno())
            data = b"" if state.st_size > max_bytes else file.read(state.st_size + 1)
            if len(data) > state.st_size:  # it grows, or does not know its size, as in /proc
                data += file.read(max_bytes + 1 - len(data))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("no such file") from error
    except OSError as error:
        raise BadSample(f"the file cannot be read ({error.strerror or error})") from error
    except BadSample:
        raise
    except ValueError as error:  # a NUL byte or half a surrogate pair in its name
        raise BadSample(f"no such file ({error})") from error
    if (num_bytes := max(state.st_size, len(data))) > max_bytes:
        raise BadSample(f"{num_bytes} bytes, more than the limit of {max_bytes}")
    return data, state
