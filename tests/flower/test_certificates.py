"""Names that certificates are made for."""

import pytest

from d2ft_fl.errors import ConfigError
from d2ft_fl.flower.certificates import _host


def test_names_and_addresses():
    assert [_host(h).value for h in ("localhost", "super-link.example", "b\u00fccher.example")] == [
        "localhost",
        "super-link.example",
        "xn--bcher-kva.example",
    ]
    assert str(_host("10.0.0.5").value) == "10.0.0.5"
    assert str(_host("::1").value) == "::1"


@pytest.mark.parametrize("host", ["", "10.0.0.5:8443", "https://x", "a b", "x..y", "-x", "a" * 80])
def test_what_is_no_name_of_a_machine_is_refused(host):
    with pytest.raises(ConfigError, match="without a scheme or port"):
        _host(host)
