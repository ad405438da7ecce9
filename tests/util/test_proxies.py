"""Proxies: this machine's own addresses are reached without one, and nothing else is."""

import socket
import urllib.request

import httpx
import psutil
import pytest

from d2ft_fl.util import proxies

PROXY = "http://127.0.0.1:9"
NAMES = [*proxies.PROXIES, *(name.upper() for name in proxies.PROXIES)]


@pytest.fixture(autouse=True)
def none_set(monkeypatch):
    for name in (*NAMES, *proxies.NO_PROXY, proxies.NO_GRPC_PROXY):
        monkeypatch.delenv(name, raising=False)


def own_addresses():
    entries = [e for found in psutil.net_if_addrs().values() for e in found]
    return {e.address for e in entries if e.family is socket.AF_INET}


@pytest.mark.parametrize("name", NAMES)
def test_whichever_names_a_proxy_own_addresses_are_spared(name):
    variables = proxies.without_own({name: PROXY})
    assert variables["no_proxy"] == variables["NO_PROXY"]
    named = set(variables["no_proxy"].split(","))
    assert {"localhost", "127.0.0.1", "::1", *own_addresses()} <= named


def test_without_a_proxy_nothing_is_set():
    assert proxies.without_own({"http_proxy": "", "no_proxy": "a.example"}) == {}


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_what_was_excepted_before_stays_excepted(monkeypatch, name):
    """For the libraries that Flower, the hub and Ray reach others by."""
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv(name, "in.example, .corp.example")
    proxies.spare_own_addresses()
    for host in ("in.example", "x.corp.example", "127.0.0.1:80", "localhost", *own_addresses()):
        assert urllib.request.proxy_bypass(host), host
    assert not urllib.request.proxy_bypass("hub.example")
    transports = httpx.Client()._transport_for_url
    plain = httpx.Client(trust_env=False)._transport
    assert type(transports(httpx.URL("http://127.0.0.1/"))._pool) is type(plain._pool)
    assert type(transports(httpx.URL("http://hub.example/"))._pool) is not type(plain._pool)


def test_a_star_goes_on_to_stand_for_everything(monkeypatch):
    """It does so alone; gRPC, which does not know it, has a variable of its own."""
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("no_proxy", "*")
    proxies.spare_own_addresses()
    assert urllib.request.proxy_bypass("hub.example")
    assert "127.0.0.1" in proxies.without_own({"http_proxy": PROXY, "no_proxy": "*"})[
        proxies.NO_GRPC_PROXY
    ].split(",")


def test_what_grpc_alone_excepts_is_extended_too():
    variables = proxies.without_own({"grpc_proxy": PROXY, "no_grpc_proxy": "in.example"})
    assert variables["no_grpc_proxy"].startswith("in.example,localhost,127.0.0.1")


def test_twice_is_as_once(monkeypatch):
    monkeypatch.setenv("https_proxy", PROXY)
    proxies.spare_own_addresses()
    once = proxies.without_own({"https_proxy": PROXY})
    assert proxies.without_own({"https_proxy": PROXY, **once}) == once
