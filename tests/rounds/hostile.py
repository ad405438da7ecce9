"""Real messages with one to three fields changed, and what may become of each change.

A change is made by a function of (draw, tensors, meta, others), which changes in place what a
message says. Beside it stands whether the message is still well-formed, so that each field has its
type and only its meaning can be wrong, and what may become of it:

* ``NEVER``: whoever accepts it is wrong.
* a set of names: it says something that the sender may say. It may be accepted, and then changes
  these parts of the record, and nothing else. ``MODEL`` among them is the model itself.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2ft_fl.planning.importance import TENSOR
from d2ft_fl.wire import blob as wire

NEVER = None
MODEL = "model"
ODD_TEXTS = (
    "", "../../../../etc", "/etc/passwd", "C:\\x", "a\x00b", "..", "~", "x" * 2000, "\ud800", "NaN",
    "$(x)", "1",
)  # fmt: skip
ODD_VALUES = (None, True, [], {}, [[1]], 1.5, *ODD_TEXTS)
ODD_NUMBERS = (-1, 2**63, 2**64, -(2**63), 2**62, 10**400)


@dataclass(frozen=True)
class Others:
    """Real messages beside the one that is changed.

    Attributes:
        clients: Those of other clients in the round: tensors and what they say.
        rounds: The client's own, of another round.
        local: How many examples the client has.
    """

    clients: list[tuple[dict[str, torch.Tensor], dict[str, Any]]]
    rounds: list[tuple[dict[str, torch.Tensor], dict[str, Any]]]
    local: int = 0


@dataclass(frozen=True)
class Change:
    """One way to change a message.

    Attributes:
        name: Of the field that is changed, and how.
        make: Changes a message; False where this one has nothing to change.
        well_formed: Whether it decodes afterwards and each field has its type.
        may: What may become of it.
    """

    name: str
    make: Callable[..., Any]
    well_formed: bool
    may: frozenset[str] | None = NEVER


def pick(draw, values):
    return values[int(draw.integers(len(values)))]


def set_to(path, *values):
    """Set a field to one of some values that it does not have."""

    def make(draw, tensors, meta, others):
        *way, last = path
        for key in way:
            meta = meta[key]
        new = [v for v in values if (type(v), v) != (type(meta[last]), meta[last])]
        meta[last] = pick(draw, new)

    return make


def left_out(*path):
    def make(draw, tensors, meta, others):
        *way, last = path
        for key in way:
            meta = meta[key]
        del meta[last]

    return make


def other_type(*path):
    """A value of another type than the field has."""

    def make(draw, tensors, meta, others):
        *way, last = path
        for key in way:
            meta = meta[key]
        old = meta[last]
        number = (int, float)
        alike = number if type(old) in number else (type(old),)
        meta[last] = pick(draw, [v for v in ODD_VALUES if type(v) not in alike])

    return make


def of_tensor(how, only=lambda name, tensor: True):
    """Change one of the tensors that ``only`` picks, by a function of (draw, tensor, others)."""

    def make(draw, tensors, meta, others):
        names = [name for name, tensor in tensors.items() if only(name, tensor) and tensor.numel()]
        if not names:
            return False
        name = pick(draw, names)
        changed = how(draw, tensors[name].clone())
        if changed is None:
            return False
        tensors[name] = changed
        return True

    return make


def is_float(name, tensor):
    return tensor.dtype is torch.float32


def with_value(*values):
    def how(draw, tensor):
        tensor.view(-1)[int(draw.integers(tensor.numel()))] = pick(draw, values)
        return tensor

    return how


def bad_scale(draw, tensor):
    """A row's scale becomes no number: its first four bytes."""
    tensor[int(draw.integers(len(tensor))), :4] = 255
    return tensor


def renamed(draw, tensors, meta, others):
    name = pick(draw, list(tensors))
    new = pick(draw, [text for text in ODD_TEXTS if text.isprintable() and text not in tensors])
    tensors[new] = tensors.pop(name)


def dropped(draw, tensors, meta, others):
    del tensors[pick(draw, list(tensors))]


def added(draw, tensors, meta, others):
    count = pick(draw, (0, 1, 7, 3000, 40_000))  # the last is more than an answer can have
    tensors[pick(draw, ("extra", "blocks.99.x", "../x", "d2ft.skip.99"))] = torch.zeros(count)


def longer(draw, tensor):
    return torch.cat([tensor, tensor[:1]]) if tensor.dim() else None


def shorter(draw, tensor):
    return tensor[1:].clone() if tensor.dim() else None


def another_shape(draw, tensor):
    return tensor.unsqueeze(0) if pick(draw, (True, False)) else tensor.flatten()[None, None]


def of_another_client(*keys):
    """Take fields as another client's message has them."""

    def make(draw, tensors, meta, others):
        _, other = pick(draw, others.clients)
        new = {key: other[key] for key in keys if other.get(key) != meta.get(key) and key in other}
        meta.update(new)
        return bool(new)

    return make


def tensors_of(which):
    """Take all tensors as another message has them, where those are not of the same shapes."""

    def make(draw, tensors, meta, others):
        candidates = others.clients if which == "client" else others.rounds
        other = pick(draw, candidates)[0] if candidates else tensors
        if {n: t.shape for n, t in other.items()} == {n: t.shape for n, t in tensors.items()}:
            return False
        tensors.clear()
        tensors.update(other)
        return True

    return make


def everything_of(which):
    """Another client's message, or that of another round, whole."""

    def make(draw, tensors, meta, others):
        candidates = others.clients if which == "client" else others.rounds
        if not candidates:
            return False
        new, said = pick(draw, candidates)
        for old, now in ((tensors, new), (meta, said)):
            old.clear()
            old.update(now)
        return True

    return make


def differences(before, after):
    """Where two messages differ: names of tensors, and fields, those within a field apart."""
    found = {("tensor", n) for n in before[0].keys() | after[0].keys()
             if before[0].get(n) is not after[0].get(n)}  # fmt: skip
    gone = object()

    def compare(old, new, place):
        if type(old) is type(new) is dict:
            for key in old.keys() | new.keys():
                compare(old.get(key, gone), new.get(key, gone), (*place, key))
        elif type(old) is type(new) is list and place == ("way",) and len(old) == len(new):
            for key, pair in enumerate(zip(old, new, strict=True)):
                compare(*pair, (*place, key))
        elif type(old) is not type(new) or old != new:
            found.add(place)

    compare(before[1], after[1], ())
    return found


def changed(draw, blob, changes, others):
    """Return a message with one to three of some changes, and these; None where none could be.

    No change changes what another has changed already.

    Args:
        draw: Random numbers.
        blob: A real message.
        changes: Ways to change it.
        others: Other real messages.
    """
    tensors, meta = wire.decode(blob)
    made, touched, count = [], set(), int(draw.integers(1, 4))
    for place in draw.permutation(len(changes))[: 2 * count]:
        new = dict(tensors), deepcopy(meta)
        try:
            applied = changes[place].make(draw, *new, others) is not False
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # this message, or a change before, has nothing there to change
        here = differences((tensors, meta), new)
        if applied and here and not here & touched and len(made) < count:
            tensors, meta = new
            made.append(changes[place])
            touched |= here
    return (wire.encode(tensors, meta), made) if made else None


def broken(draw, blob):
    """Return a message whose bytes are not those of one."""
    cut = int(draw.integers(len(blob)))
    header = 8 + int.from_bytes(blob[:8], "little")
    noise = bytes(draw.integers(0, 256, int(draw.integers(1, 200)), dtype=np.uint8))
    return pick(
        draw,
        [blob[:cut], blob + noise, noise, noise + blob, blob[:header], b"\xff" * 8 + blob[8:]],
    )


def _meaning(name, make, may=NEVER):
    return Change(name, make, True, None if may is NEVER else frozenset(may))


def _form(name, make):
    return Change(name, make, False)


TENSORS = [
    _meaning("a tensor is missing", dropped),
    _meaning("a tensor has another name", renamed),
    _meaning("a tensor more", added),
    _meaning("a tensor is longer", of_tensor(longer)),
    _meaning("a tensor is shorter", of_tensor(shorter)),
    _meaning("a tensor has another shape", of_tensor(another_shape)),
    _meaning("not finite", of_tensor(with_value(np.nan, np.inf, -np.inf), is_float)),
    _meaning("a bad scale", of_tensor(bad_scale, lambda n, t: t.dtype is torch.uint8)),
    _form("a tensor of another type", of_tensor(lambda d, t: t.double())),
    _form("a tensor of whole numbers", of_tensor(lambda d, t: t.to(torch.int64))),
    _meaning("another client's tensors", tensors_of("client")),
    _meaning("another round's tensors", tensors_of("round")),
    _meaning("another client's message", everything_of("client")),
    _meaning("another round's message", everything_of("round")),
]

_USED = ("flops", "memory", "bytes_down")
_SECONDS = ("seconds", "training")
REPLIES = [
    *TENSORS,
    _meaning("huge values", of_tensor(with_value(1e30, -1e38), lambda n, t: is_float(n, t)
             and not n.startswith(TENSOR))),
    _meaning("negative scores", of_tensor(with_value(-1.0), lambda n, t: n.startswith(TENSOR))),
    *(_meaning(f"{k} cannot be", set_to((k,), *ODD_NUMBERS, 0, 7, 99)) for k in ("round",)),
    _meaning("client cannot be", set_to(("client",), *ODD_NUMBERS, 7, 99)),
    _meaning("another client", of_another_client("client")),
    _meaning("examples", set_to(("slot_examples",), [], [1], [0, 0], [1, 1], [2**63, 1], [-1, 9])),
    _meaning("loss cannot be", set_to(("loss",), 1e308, -1e308, 1e16, 10**400)),
    *(_meaning(f"used {k} cannot be", set_to(("used", k), *ODD_NUMBERS)) for k in _USED),
    *(_meaning(f"{k} cannot be", set_to(("used", k), *ODD_TEXTS, "inf", "nan", "1e9", "-1",
               "9" * 99, "00000001.0000", "-000001.000", "\u0660" * 8 + ".000")) for k in _SECONDS),
    _meaning("an error", lambda d, t, m, o: m.update(error=pick(d, ODD_TEXTS))),
    _form("a field more", lambda d, t, m, o: m.update({pick(d, ("x", "device", "")): "y"})),
    _form("a field more of use", lambda d, t, m, o: m["used"].update(x=1)),
    *(_form(f"no {k}", left_out(k)) for k in ("round", "client", "slot_examples", "loss", "used")),
    *(_form(f"no used {k}", left_out("used", k)) for k in (*_USED, *_SECONDS)),
    *(_form(f"type of {k}", other_type(k))
      for k in ("round", "client", "slot_examples", "loss", "used")),
    *(_form(f"type of used {k}", other_type("used", k)) for k in (*_USED, *_SECONDS)),
    _form("loss is not finite", set_to(("loss",), float("nan"), float("inf"), -float("inf"))),
    # What a client says of itself, and nobody else knows.
    _meaning("another loss", set_to(("loss",), 0.0, -1.5, 123.25, 1e15), {"train_loss"}),
    *(_meaning(f"another {k}", set_to(("used", k), 0, 1, 2**62 - 1), {"used", "seconds"})
      for k in _USED),
    _meaning("other seconds", set_to(("used", "seconds"), "00000000.000", "99999999.999"),
             {"wall_seconds"}),
    _meaning("other seconds of training",
             set_to(("used", "training"), "00000000.000", "99999999.999"), {"training_seconds"}),
    _meaning("other values", of_tensor(with_value(0.125), is_float), {MODEL}),
]  # fmt: skip


def _operations(*codes):
    """One operation becomes another."""

    def make(draw, tensors, meta, others):
        data = bytearray.fromhex(meta["operations"])
        place = int(draw.integers(len(data)))
        data[place] = pick(draw, [code for code in codes if code != data[place]])
        meta["operations"] = bytes(data).hex()

    return make


def _hex(key, how):
    """Change a text of hexadecimal digits; its length stays where ``how`` keeps it."""

    def make(draw, tensors, meta, others):
        new = how(draw, meta[key])
        same = new == meta[key]
        meta[key] = new
        return not same

    return make


def _other_digits(draw, text):
    place = int(draw.integers(len(text)))
    return (
        text[:place]
        + pick(draw, [c for c in "0123456789abcdef" if c != text[place]])
        + (text[place + 1 :])
    )


def _path_digest(draw, text):
    """One digest becomes a path of the same length."""
    place = 16 * int(draw.integers(len(text) // 16))
    paths = ("../../../victim/", "/nowhere/victim/aaaa", "..%2f..%2fvictim", "victim\x00aaaaaaaaa",
             "ABCDEF0123456789", "\u0660" * 16, " " * 16, "0x12345678901234")  # fmt: skip
    return text[:place] + pick(draw, paths) + text[place + 16 :]


def _swapped_blocks(draw, text):
    """The digest of the outer group becomes that of another."""
    return text[16:32] + text[16:] if len(text) > 32 else text


def _way(place, *values):
    def make(draw, tensors, meta, others):
        new = [
            v for v in values if v != meta["way"][place] or type(v) is not type(meta["way"][place])
        ]
        meta["way"][place] = pick(draw, new)

    return make


def _examples(low, high):
    """Another number of examples: from ``low`` to ``high`` more than the client has."""

    def make(draw, tensors, meta, others):
        number = others.local + int(draw.integers(low(others.local), high + 1))
        if number == meta["examples"]:
            return False
        meta["examples"] = number
        return True

    return make


def _passes(*how):
    def make(draw, tensors, meta, others):
        new = pick(draw, how)(others.local)
        if new == meta["passes"]:
            return False
        meta["passes"] = new
        return True

    return make


_BUDGETS = (
    {"speed": 5e-324}, {"flops": 1e308}, {"flops": -1}, {"memory": 2**2000}, {"device": "x" * 99},
    {"device": "a\nb"}, {"curve": "/etc/passwd"}, {"curve": "../../x"}, {"flops": "40 %"},
    {"bandwidth_up": 0}, {"deadline": 0}, {"deadline": 1e300}, {"x": 1}, {"curve": {}},
    {"flops": {"share": -0.5}}, {"flops": {"share": 1e300}},
)  # fmt: skip
_MINE = {"work"}  # of the client itself, which it does within its budget
ASSIGNMENTS = [
    *TENSORS,
    *(_meaning(f"{k} cannot be", set_to((k,), *ODD_NUMBERS, 0 if k == "round" else -2, 99))
      for k in ("round", "client")),
    _meaning("another client", of_another_client("client")),
    _meaning("an operation that is none", _operations(4, 7, 127, 128, 255)),
    _meaning("operations' length", _hex("operations", lambda d, t: pick(d, (t[2:], t + "03", "")))),
    _meaning("nothing to do", _hex("operations", lambda d, t: "0" * len(t))),
    _meaning("another shape", set_to(("shape",), [], [1], [1, 1, 1], [2**63, 6, 6], [-1, -6, 6],
             [36, 1, 1], [1, 6, 6, 1])),
    _meaning("more examples", _examples(lambda n: 1, 99)),
    _meaning("no examples", set_to(("examples",), 0, -1, 2**63, -(2**63), 10**400)),
    _meaning("probes that cannot be", _passes(
        lambda n: [n + 1, 0, "fisher"], lambda n: [2**63, 0, "fisher"], lambda n: [-1, 0, "fisher"],
        lambda n: [1, 0, "x"], lambda n: [1, 0, "../x"], lambda n: [1, 0, "fisher", "fisher"],
        lambda n: [0, n - 1], lambda n: [0, n + 1], lambda n: [0, 0, "fisher"], lambda n: [1, 0],
        lambda n: [1, 0, "magnitude"])),
    _meaning("calibrates", lambda d, t, m, o: m.update(calibrate=not m["calibrate"])),
    _meaning("keeps", set_to(("keeps",), ["x"], ["memory", "flops"], ["flops", "flops"], ["/x"])),
    _meaning("micro-batches", _way(0, 0, -1, 17, 10**6, 2**63)),
    _meaning("tokens", _way(2, 0, -1, 1, 2**63, 10**6)),
    _meaning("bits up", _way(3, 0, 7, 16, -8, 2**63)),
    _meaning("bits down", _way(4, 0, 4, 7, 16, -8, 2**63)),
    *(_meaning(f"factor {n}", _way(n, 0, -1.0, 1e308, 2**63, 1e7)) for n in (6, 7, 8)),
    _meaning("batch", _way(9, 0, -1, 2**63)),
    _meaning("a way of another length", lambda d, t, m, o: m["way"].append(None)),
    _meaning("a budget", set_to(("budget",), *_BUDGETS)),
    _meaning("held", set_to(("held",), -1, 2, 2**63)),
    _meaning("ranks", _hex("ranks", lambda d, t: pick(d, ("00", "ff")) * (len(t) // 2))),
    _meaning("ranks' length", _hex("ranks", lambda d, t: pick(d, (t[2:], t + "01", "")))),
    _meaning("holds' length", _hex("holds", lambda d, t: pick(d, (t[2:], t + "00", "")))),
    _meaning("another digest", _hex("digests", _other_digits)),
    _meaning("a digest that is a path", _hex("digests", _path_digest)),
    _meaning("a digest of another group", _hex("digests", _swapped_blocks)),
    _meaning("digests' length",
             _hex("digests", lambda d, t: pick(d, (t[1:], t + "0", t[16:], "")))),
    *(_form(f"no {k}", left_out(k)) for k in ("round", "client", "operations", "shape", "passes",
      "examples", "way", "calibrate", "keeps", "digests", "holds", "held")),
    *(_form(f"type of {k}", other_type(k)) for k in ("round", "client", "operations", "shape",
      "passes", "examples", "way", "calibrate", "keeps", "digests", "holds", "ranks", "budget")),
    *(_form(f"type in way {n}", _way(n, *ODD_TEXTS, [], 1.5 if n < 6 or n == 9 else "1.5"))
      for n in range(10)),
    _form("a factor that is not finite", _way(6, float("nan"), float("inf"))),
    _form("a field more", lambda d, t, m, o: m.update({pick(d, ("path", "x", "")): "y"})),
    # What a server may ask for: it does not leave the client's budget.
    _meaning("fewer examples", _examples(lambda n: 1 - n, -1), _MINE),
    _meaning("another operation", _operations(0, 1, 2, 3), _MINE),
    _meaning("other factors", lambda d, t, m, o: m["way"].__setitem__(
        6 + int(d.integers(3)), float(d.uniform(0.1, 2))), _MINE),
    _meaning("in turn", _way(5, True, False), _MINE),
    _meaning("more micro-batches", _way(0, 2, 4), _MINE),
    _meaning("checkpoints", _way(1, True, False), _MINE),
    _meaning("smaller batches", _way(9, 4, 8), _MINE),
    _meaning("other bits up", _way(3, 4, 8, 32), _MINE),
    _meaning("other values", of_tensor(with_value(0.125), is_float), _MINE),
    _meaning("other ranks", _hex("ranks", lambda d, t: "01" * (len(t) // 2)), _MINE),
    _meaning("probes", _passes(lambda n: [2, 0, "fisher"], lambda n: [0, n]), _MINE),
    _meaning("another client's plan", of_another_client("operations", "ranks"), _MINE),
    _meaning("held subnets", _hex("holds", _other_digits), _MINE),  # those that do not run
    _meaning("keeps less", set_to(("keeps",), [], ["memory"]), _MINE),
]  # fmt: skip
