"""A budget source that names the machine that it is asked on."""

import os


def budget(client: object, round_number: int) -> dict[str, str]:
    """Its mount namespace stands for a machine."""
    return {"flops": "80 %", "device": os.readlink("/proc/self/ns/mnt")}
