import torch

from d2ft_fl.meter import LiveBytes, Meter, tensor_bytes


def test_live_bytes_follow_storages_from_birth_to_death():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b[10:]
        assert live.live == 8000
        del a, b
        assert live.live == 4000  # the view keeps its storage
        del view
        assert live.live == 0
    assert live.peak == 8000


def test_what_was_there_before_is_not_counted():
    old = torch.zeros(100)
    live = LiveBytes()
    live.ignore([old])
    with live:
        old.add_(1)
        old.view(10, 10)
    assert live.peak == 0


def test_a_pattern_is_measured_once_unless_every_one_is_verified():
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    for verify in (False, True):
        meter = Meter(verify=verify)
        meter.start()
        for _ in range(3):
            meter.run(lambda: a @ b, key="product", base=128 * 4 + 64 * 4, known=lambda: [a, b])
        assert meter.flops == 3 * 2 * 8 * 16 * 4
        assert meter.peak_bytes == tensor_bytes([a, b]) + 8 * 4 * 4
