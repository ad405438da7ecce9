import torch
from torch.utils.flop_counter import FlopCounterMode

from d2ft_fl.engine.meter import Flops, LiveBytes, Meter, tensor_bytes


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


def test_flops_are_those_of_torchs_counter():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    images, heads = torch.randn(3, 5, 16), torch.randn(3, 2, 5, 8)

    def trained():
        layer.train()(images).square().sum().backward()
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    def inferred():  # torch hands these over before it takes them apart
        with torch.inference_mode():
            torch.nn.functional.linear(images, torch.randn(7, 16)).matmul(torch.randn(7, 2))

    for step in (trained, inferred):
        with FlopCounterMode(display=False) as theirs:
            step()
        with Flops() as counter, LiveBytes() as live:
            step()
        assert live.flops == theirs.get_total_flops() > 0
        assert counter.flops == live.flops
