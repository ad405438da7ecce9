"""Proxies are for what is elsewhere: this machine is reached without one.

Flower and Ray speak to their own processes over addresses of this machine, by HTTP and gRPC, whose
libraries take proxies from the environment for all addresses that ``no_proxy`` does not name.
"""

import os
import socket
from collections.abc import Mapping

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
NO_PROXY = ("no_proxy", "NO_PROXY")  # of the first, where it is set, most libraries read no other
NO_GRPC_PROXY = "no_grpc_proxy"  # which gRPC reads instead, where it is set


def without_own(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep proxies away from this machine's own addresses.

    They say what they said before, and more; none are needed where there is no proxy.

    Args:
        environment: Variables of the environment.
    """
    named = {name.lower() for name, value in environment.items() if value}
    if named.isdisjoint(PROXIES):
        return {}
    own, variables = _own_addresses(), {}
    for name, other in (NO_PROXY, NO_PROXY[::-1]):
        before = environment.get(name) or environment.get(other) or ""
        # A star stands for everything, but only alone, and not to gRPC.
        variables[name] = before if before.strip() == "*" else _joined(before, own)
    if NO_GRPC_PROXY in environment or "*" in variables.values():
        variables[NO_GRPC_PROXY] = _joined(environment.get(NO_GRPC_PROXY, ""), own)
    return variables


def spare_own_addresses() -> None:
    """Keep proxies away from this machine's own addresses, here and in processes to be started."""
    os.environ.update(without_own(os.environ))


def _joined(before: str, own: list[str]) -> str:
    entries = [entry.strip() for entry in before.split(",") if entry.strip()]
    return ",".join(dict.fromkeys([*entries, *own]))


def _own_addresses() -> list[str]:
    """Return names and addresses of this machine."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    addresses = [
        entry.address.split("%")[0]  # an interface's name goes after
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    ]
    return ["localhost", "127.0.0.1", "::1", socket.gethostname(), *addresses]
