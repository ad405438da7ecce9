"""How many files this process and those that it starts may have open."""

import errno
import os

MOST = 1 << 16  # some programs walk through all numbers that descriptors may have


def raise_descriptors() -> None:
    """Allow as many open files as this user may have, where the shell allows fewer.

    Ray's processes need a few hundred each, whatever the number of clients.
    """
    if os.name == "posix":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def advice(error: OSError) -> str:
    """Return what to do about an error where too many files are open, as the end of a message."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return ""
    return "; allow more open files: ulimit -n 4096, or the limit of the machine"
