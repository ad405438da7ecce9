"""A made-up model with nothing of a vision transformer's, its adapter, and checks of both.

It reads tokens. Its attention has several query heads to a key and value head, with an additive
bias by distance and padding left out; its feed-forward layer is gated; products have no fused
weights and mostly no biases; norms are by root mean square. A subnet is one key and value head,
the three query heads that share it, and a slice of the feed-forward layer; slices are uneven.

Run as a program it does without timm, calls every ``check_...`` and prints what came of each as
JSON; see ``test_made_up_architecture``.
"""

import json
import sys
import traceback
from dataclasses import replace
from functools import partial

sys.modules["timm"] = None  # importing it fails from here on

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from d2ft_fl.aggregation.mean_compensation import MeanBook, MeanSums  # noqa: E402
from d2ft_fl.aggregation.sums import Sums  # noqa: E402
from d2ft_fl.aggregation.update import Update  # noqa: E402
from d2ft_fl.budgets.budget import Budget  # noqa: E402
from d2ft_fl.config.run_config import RunConfig  # noqa: E402
from d2ft_fl.config.training_options import TrainingOptions  # noqa: E402
from d2ft_fl.costs.cost_model import CostModel  # noqa: E402
from d2ft_fl.engine.mean_tally import MeanTally, received  # noqa: E402
from d2ft_fl.engine.meter import Meter  # noqa: E402
from d2ft_fl.engine.model_adapter import BranchTraits  # noqa: E402
from d2ft_fl.engine.numerics import Numerics  # noqa: E402
from d2ft_fl.engine.partial_model import PartialModel  # noqa: E402
from d2ft_fl.engine.trainer import train  # noqa: E402
from d2ft_fl.errors import ConfigError  # noqa: E402
from d2ft_fl.lora.config import Lora, merged, with_lora  # noqa: E402
from d2ft_fl.lora.init import begin  # noqa: E402
from d2ft_fl.planning.assignment import Participant  # noqa: E402
from d2ft_fl.planning.planner import Planner  # noqa: E402
from d2ft_fl.subnets.architecture import Architecture, Kind, Parameter  # noqa: E402
from d2ft_fl.subnets.branches import BranchKind, BranchSpec  # noqa: E402
from d2ft_fl.subnets.packing import pack_for  # noqa: E402
from d2ft_fl.subnets.schedule import Operation, Schedule  # noqa: E402
from d2ft_fl.tasks.image_classification import ImageClassification  # noqa: E402
from d2ft_fl.tasks.task import Batch  # noqa: E402

WORDS, DIM, BLOCKS, GROUPS, SHARING, WIDTH, HIDDEN, TOKENS, CLASSES = 11, 20, 3, 2, 3, 4, 13, 7, 3
FULL, FROZEN, FORWARD_ONLY, SHORTCUT = (
    Operation.FULL,
    Operation.FROZEN,
    Operation.FORWARD_ONLY,
    Operation.SHORTCUT,
)


def rms(x, gain):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain_a, self.gain_b = nn.Parameter(torch.rand(DIM)), nn.Parameter(torch.rand(DIM))
        self.ask = nn.Linear(DIM, GROUPS * SHARING * WIDTH)  # the only product with a bias
        self.key = nn.Linear(DIM, GROUPS * WIDTH, bias=False)
        self.give = nn.Linear(DIM, GROUPS * WIDTH, bias=False)
        self.merge = nn.Linear(GROUPS * SHARING * WIDTH, DIM, bias=False)
        self.rise = nn.Linear(DIM, HIDDEN, bias=False)
        self.gate = nn.Linear(DIM, HIDDEN, bias=False)
        self.fall = nn.Linear(HIDDEN, DIM, bias=False)


class Plain(nn.Module):
    """The model as its library would run it; and head by head, as a schedule of one slot says."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Embedding(WORDS, DIM)
        self.tower = nn.ModuleList(Layer() for _ in range(BLOCKS))
        self.last_gain = nn.Parameter(torch.rand(DIM))
        self.verdict = nn.Linear(DIM, CLASSES)

    def bias(self, ids):
        """[examples, 1, tokens, tokens], added to what softmax is taken of."""
        place = torch.arange(ids.shape[1], dtype=self.last_gain.dtype)
        distance = -0.1 * (place[:, None] - place[None]).abs()
        padded = torch.zeros(ids.shape, dtype=distance.dtype).masked_fill(ids == 0, -1e9)
        return distance[None, None] + padded[:, None, None]

    def forward(self, ids):
        x, bias = self.stem(ids), self.bias(ids)
        shape = (*ids.shape, GROUPS, -1, WIDTH)
        for layer in self.tower:
            y = rms(x, layer.gain_a)
            q, k, v = (p(y).view(shape) for p in (layer.ask, layer.key, layer.give))
            q = q.flatten(2, 3).transpose(1, 2)  # [examples, query heads, tokens, width]
            k, v = (t.expand(-1, -1, -1, SHARING, -1).flatten(2, 3).transpose(1, 2) for t in (k, v))
            weights = (q @ k.mT / WIDTH**0.5 + bias).softmax(-1)
            x = x + layer.merge((weights @ v).transpose(1, 2).flatten(2))
            y = rms(x, layer.gain_b)
            x = x + layer.fall(F.silu(layer.gate(y)) * layer.rise(y))
        return self.verdict(rms(x, self.last_gain).mean(1))

    def by_heads(self, ids, operations):
        """Logits where head h of block l does ``operations[l][h]``."""
        x, bias = self.stem(ids).detach(), self.bias(ids)
        for layer, of_block in zip(self.tower, operations, strict=True):
            for branch, gain in ((self._attend, layer.gain_a), (self._feed, layer.gain_b)):
                y = rms(x, gain if FULL in of_block else gain.detach())
                total = torch.zeros_like(x)
                for head, operation in enumerate(of_block):
                    if operation == SHORTCUT:
                        continue
                    trains = operation == FULL
                    w = {n: p if trains else p.detach() for n, p in layer.named_parameters()}
                    into = y.detach() if operation == FORWARD_ONLY else y
                    total = total + branch(w, into, bias, head)
                x = x + total
        return self.verdict(rms(x, self.last_gain).mean(1))

    @staticmethod
    def _attend(w, y, bias, head):
        own = slice(head * SHARING * WIDTH, (head + 1) * SHARING * WIDTH)
        one = slice(head * WIDTH, (head + 1) * WIDTH)
        q = y @ w["ask.weight"][own].T + w["ask.bias"][own]
        q = q.unflatten(-1, (SHARING, WIDTH)).transpose(1, 2)
        k, v = ((y @ w[f"{p}.weight"][one].T)[:, None] for p in ("key", "give"))
        z = (q @ k.mT / WIDTH**0.5 + bias).softmax(-1) @ v
        return z.transpose(1, 2).flatten(2) @ w["merge.weight"][:, own].T

    @staticmethod
    def _feed(w, y, bias, head):
        own = SLICES[head]
        z = F.silu(y @ w["gate.weight"][own].T) * (y @ w["rise.weight"][own].T)
        return z @ w["fall.weight"][:, own].T


SLICES = [slice(0, 7), slice(7, 13)]  # of HIDDEN
EVEN = [slice(head * WIDTH, (head + 1) * WIDTH) for head in range(GROUPS)]
WIDE = [slice(SHARING * s.start, SHARING * s.stop) for s in EVEN]
CUTS = {  # role -> axis, slices
    "ask.weight": (0, WIDE),
    "ask.bias": (0, WIDE),
    "key.weight": (0, EVEN),
    "give.weight": (0, EVEN),
    "merge.weight": (1, WIDE),
    "rise.weight": (0, SLICES),
    "gate.weight": (0, SLICES),
    "fall.weight": (1, SLICES),
}


class Adapter:
    """What the project sees of the made-up model."""

    input_shape = (TOKENS,)

    def __init__(self, model):
        self.model = model

    def describe(self):
        return Architecture(
            blocks=BLOCKS,
            heads=GROUPS,
            dim=DIM,
            tokens=TOKENS,
            prefix=0,
            classes=CLASSES,
            branches=(
                BranchSpec(
                    BranchKind.ATTENTION,
                    norm="gain_a",
                    inward=("ask", "key", "give"),
                    outward="merge",
                    widths=(SHARING * WIDTH,) * GROUPS,
                ),
                BranchSpec(
                    BranchKind.FEED_FORWARD,
                    norm="gain_b",
                    inward=("rise", "gate"),
                    outward="fall",
                    widths=tuple(s.stop - s.start for s in SLICES),
                    gated=True,
                ),
            ),
            classifier="verdict",
            rms=True,
            output_dropout=0.0,
            drop_path=0.0,
            embed_flops=0,
            input_elements=TOKENS,
            norm_pooled=False,
            parameters=tuple(self._parameter(*named) for named in self.model.named_parameters()),
        )

    def _parameter(self, name, tensor):
        shape = tuple(tensor.shape)
        if not name.startswith("tower."):
            if name.startswith("stem."):
                return Parameter(name, shape, Kind.EMBEDDING, trains=False)
            return Parameter(name, shape, Kind.FINAL)
        _, block, role = name.split(".", 2)
        if role not in CUTS:
            return Parameter(name, shape, Kind.SHARED, f"{role}.weight", int(block))
        axis, slices = CUTS[role]
        rows = tuple(tuple(range(s.start, s.stop)) for s in slices)
        return Parameter(name, shape, Kind.SLICED, role, int(block), axis, rows)

    def block_traits(self, device):
        def norm(x, own):
            return rms(x, own["weight"])

        def attend(training, hs, shared, context):
            q, k, v = (h.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for h in hs)
            k, v = (t.repeat_interleave(SHARING, dim=1) for t in (k, v))
            bias = context["distance"] + context["padded"]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return out.transpose(1, 2).flatten(2)

        def feed(training, hs, shared, context):
            return F.silu(hs[1]) * hs[0]

        return [(BranchTraits(norm, attend), BranchTraits(norm, feed))] * BLOCKS

    notes = ()

    def without_blocks(self):
        outer = Plain().to(self.model.last_gain.dtype)
        outer.tower = nn.ModuleList()
        rest = {n: t for n, t in self.model.state_dict().items() if not n.startswith("tower.")}
        outer.load_state_dict(rest)
        outer.stem.requires_grad_(False)
        return outer

    def embed(self, outer, inputs, tokens):
        nothing = torch.ones_like(inputs)
        distance = self.model.bias(nothing[:1])  # the same for all examples
        padded = torch.zeros(inputs.shape, dtype=distance.dtype).masked_fill(inputs == 0, -1e9)
        return outer.stem(inputs), {"distance": distance, "padded": padded[:, None, None]}

    def features(self, outer, x, context):
        return rms(x, outer.last_gain).mean(1)

    def logits(self, outer, features):
        return outer.verdict(features)

    def forward(self, inputs):
        return self.model(inputs)

    def export(self, folder, weights):
        raise NotImplementedError


def made(dtype=torch.float64):
    """A model, its adapter and architecture, its weights, and a batch of six examples."""
    torch.manual_seed(0)
    model = Plain().to(dtype)
    adapter = Adapter(model)
    ids = torch.randint(1, WORDS, (6, TOKENS))
    ids[1, 4:], ids[4, 2:] = 0, 0  # padding
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, adapter, adapter.describe(), weights, ids, torch.arange(6) % CLASSES


def schedule_of(*slots):
    """Slots of blocks of heads."""
    return Schedule(np.array(slots, dtype=np.int8))


ALL_FULL = [[FULL] * GROUPS] * BLOCKS
MIXED = [[FULL, FROZEN], [FROZEN, FORWARD_ONLY], [FULL, SHORTCUT]]
OTHER = [[SHORTCUT, FULL], [SHORTCUT, SHORTCUT], [FORWARD_ONLY, FULL]]
LOW = [[FROZEN, FORWARD_ONLY], [FORWARD_ONLY, FULL], [FROZEN, FROZEN]]


def close(found, expected, what):
    scale = max(float(expected.detach().norm()), 1e-12)
    error = float((found - expected).detach().norm()) / scale
    assert error <= 1e-12, f"{what}: {error}"


def compare(operations, reference):
    """The engine beside a reference's logits: values, and gradients of all that trains."""
    model, adapter, arch, weights, ids, labels = made()
    schedule = schedule_of(operations)
    engine = PartialModel(adapter, arch, Numerics(torch.float64))
    engine.reset(schedule, pack_for(arch, weights, schedule))
    found, expected = engine(ids, [len(ids)]), reference(model, ids)
    close(found, expected, "logits")
    F.cross_entropy(found, labels).backward()
    F.cross_entropy(expected, labels).backward()
    plain = dict(model.named_parameters())
    compared = set()
    for name, tensor in engine.whole().items():
        close(tensor.grad, plain[name].grad, name)
        compared.add(name)
    for index, block in engine.blocks.items():
        for role, grad in block.store.grads.items():
            p = engine.specs[index][role]
            close(grad, p.pack(plain[p.name].grad, block.store.trained), p.name)
            compared.add(p.name)
            rest = [head for head in range(GROUPS) if head not in block.store.trained]
            assert not p.pack(plain[p.name].grad, rest).any(), f"{p.name} of {rest}"
    return compared, plain


def check_everything_full_is_the_plain_model():
    compared, plain = compare(ALL_FULL, lambda model, ids: model(ids))
    assert compared == plain.keys() - {"stem.weight"}


def check_a_mixture_of_operations_is_the_model_head_by_head():
    for operations in (MIXED, OTHER, LOW):
        reference = partial(Plain.by_heads, operations=operations)
        compared, plain = compare(operations, reference)
        for name in plain.keys() - compared:  # nothing else has any gradient
            grad = plain[name].grad
            assert name == "stem.weight" or grad is None or not grad.any(), name


def check_skipped_heads_have_no_gradient_and_no_weights():
    _, adapter, arch, weights, ids, _ = made()
    schedule = schedule_of(OTHER)
    engine = PartialModel(adapter, arch, Numerics(torch.float64))
    engine.reset(schedule, pack_for(arch, weights, schedule))
    engine(ids, [len(ids)]).sum().backward()
    assert sorted(engine.blocks) == [0, 2]
    assert engine.blocks[0].store.order == (1,)
    assert engine.blocks[0].store.weights["rise.weight"].shape == (6, DIM)
    assert engine.blocks[2].store.trained == (1,)


def options_of(**changes):
    plain = {"batch_size": 4, "optimizer": "sgd", "momentum": 0.0}
    return TrainingOptions.of(RunConfig(**plain, **changes))


def rate(kind, factor, options):
    return 0.1


def trained(schedule, arch, weights, adapter, ids, labels, **options):
    """What a client sends after a round, its meter, and the cost model."""
    local = options_of(**options)
    costs = CostModel(arch, local, schedule.slots)
    engine = PartialModel(adapter, arch, Numerics.of(local))
    meter = Meter(verify=True)
    meter.count(lambda: engine.reset(schedule, pack_for(arch, weights, schedule)))
    batches = [Batch(ids[i : i + 4], labels[i : i + 4]) for i in range(0, len(ids), 4)]
    train(engine, iter(batches), ImageClassification(), local, rate, meter)
    return engine.update(), meter, costs


def check_counted_flops_are_those_predicted():
    _, adapter, arch, weights, ids, labels = made(torch.float32)
    for slots in ([ALL_FULL], [MIXED], [OTHER, LOW], [LOW, MIXED]):
        for checkpointing in (False, True):
            schedule = schedule_of(*slots)
            args = schedule, arch, weights, adapter, ids, labels
            _, meter, costs = trained(*args, checkpointing=checkpointing)
            assert meter.flops == costs.flops(schedule, len(ids)), (slots, checkpointing)


def check_a_training_step_is_the_plain_models():
    model, adapter, arch, weights, ids, labels = made(torch.float32)
    update, *_ = trained(schedule_of(ALL_FULL), arch, weights, adapter, ids, labels)
    parameters = [p for name, p in model.named_parameters() if name != "stem.weight"]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for start in (0, 4):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[start : start + 4]), labels[start : start + 4]).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        spec = arch.by_name[name]
        new = p.detach()
        if spec.kind is Kind.EMBEDDING:
            assert name not in update
            continue
        expected = spec.pack(new, range(GROUPS)) if spec.kind is Kind.SLICED else new
        torch.testing.assert_close(update[name], expected, rtol=1e-5, atol=1e-6)


def check_lora_finds_its_products_and_costs_what_it_counts():
    _, adapter, base, weights, ids, labels = made(torch.float32)
    assert base.possible_targets == ("ask", "merge", "rise", "fall")
    arch = with_lora(base, Lora(rank=2, alpha=3.0))
    state = begin(arch, weights, "federa", seed=0)
    for slots in ([ALL_FULL], [MIXED], [OTHER, LOW]):
        schedule = schedule_of(*slots)
        update, meter, costs = trained(schedule, arch, state, adapter, ids, labels)
        assert meter.flops == costs.flops(schedule, len(ids)), slots
        assert {name for name in update if not arch.by_name[name].factor} == {
            "verdict.weight",
            "verdict.bias",
        }
    for name, tensor in merged(arch, state).items():  # FeDeRA begins where the model was
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5)


def check_the_planner_keeps_budgets_that_the_meter_confirms():
    _, adapter, arch, weights, ids, labels = made(torch.float32)
    local = options_of()
    costs = CostModel(arch, local, 2)
    full = costs.full_cost(len(ids)).vector()
    scores = np.random.default_rng(0).random((2, BLOCKS, GROUPS))
    for share in (0.35, 0.6, 1.2):
        capacity = (share * full).astype(np.int64)
        client = Participant(0, len(ids), Budget(), capacity)
        (plan,) = Planner(costs).plan([client], *scores)
        assert (plan.cost.vector() <= capacity).all()
        assert plan.schedule.trained.any()
        args = plan.schedule, arch, weights, adapter, ids, labels
        _, meter, _ = trained(*args)
        assert meter.flops == plan.cost.flops
        assert meter.peak_bytes <= 1.1 * plan.cost.memory  # the biases are not part of the costs
    assert plan.schedule.trained.all()  # with more than everything costs


def check_updates_are_aggregated_slice_by_slice():
    _, adapter, arch, weights, ids, labels = made(torch.float32)
    sums = Sums(arch, weights, 12)
    updates = []
    for operations, count in ((MIXED, 4), (OTHER, 6)):
        schedule = schedule_of(operations)
        tensors, *_ = trained(schedule, arch, weights, adapter, ids[:count], labels[:count])
        updates.append({n: t.clone() for n, t in tensors.items()})
        sums.add(Update(schedule, [count], updates[-1]))
    new = sums.apply()
    # Block 0: the first client trains head 0, the second head 1. Block 1: nobody trains.
    for name in ("ask.weight", "give.weight", "rise.weight", "merge.weight", "fall.weight"):
        p = arch.by_name[f"tower.0.{name}"]
        for head, update in enumerate(updates):
            torch.testing.assert_close(p.pack(new[p.name], [head]), update[p.name])
        assert torch.equal(new[f"tower.1.{name}"], weights[f"tower.1.{name}"])
    mean = (4 * updates[0]["verdict.weight"] + 6 * updates[1]["verdict.weight"]) / 10
    torch.testing.assert_close(new["verdict.weight"], mean)


def check_the_mean_of_a_skipped_head_stands_for_it():
    """With one example the mean is what the head adds, so that skipping it changes nothing."""
    _, adapter, arch, weights, ids, _ = made(torch.float32)
    one, everything = ids[:1], schedule_of([[FORWARD_ONLY] * GROUPS] * BLOCKS)
    engine = PartialModel(adapter, arch)
    engine.reset(everything, pack_for(arch, weights, everything))
    tally = MeanTally(engine)
    with torch.no_grad():
        expected = engine(one, [1])
    sums = MeanSums(arch, 1)
    means = tally.finish()
    sums.check(everything, means)
    sums.add(everything, [1], means)
    book = sums.apply(MeanBook())
    skips = schedule_of([[FORWARD_ONLY, SHORTCUT], *[[FORWARD_ONLY] * GROUPS] * 2])
    offsets = received(skips, book.offsets(arch, weights, skips))
    engine.reset(skips, pack_for(arch, weights, skips), offsets)
    with torch.no_grad():
        torch.testing.assert_close(engine(one, [1]), expected, rtol=1e-4, atol=1e-5)


def check_a_norm_behind_the_sum_is_refused():
    _, adapter, arch, *_ = made()
    first, second = arch.branches
    behind = replace(arch, branches=(first, replace(second, norm_first=False)))
    with pytest.raises(ConfigError, match="not behind the sum"):
        PartialModel(adapter, behind)


def main():
    """Print a mapping of checks to nothing, or to how they failed."""
    torch.set_num_threads(1)
    found = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    loaded = [m for m in sys.modules if m.startswith(("timm.", "d2ft_fl.models"))]
    print(json.dumps({"checks": found, "loaded": loaded}))


if __name__ == "__main__":
    main()
