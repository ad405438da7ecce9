"""The page of all strategies, ``docs/methods.md``."""

from d2ft_fl.rounds.strategies import Strategy

_HEAD = """# Methods

Every method runs on the one engine. A strategy decides which client runs which heads, a way of
tuning (whole, or LoRA) how they are trained, the server's optimiser how averaged updates are
applied. So methods that were published apart are compared under the same budgets, enforced and
measured, with the same data and seeds.

This page is what `d2ft strategies --markdown` prints: each strategy's own words. A layer is all
heads of a block.

"""


_TAIL = """# Methods that are options

LoRA methods were published with everyone training everything: `strategy = "fedavg"`. Any other strategy
combines with them too.

| method | options |
| --- | --- |
| FedProx (Li et al., MLSys 2020, arXiv 1812.06127) | `proximal = 0.01`, with any strategy |
| FedFT-EDS (Shi et al., 2024, arXiv 2501.00170) | `strategy = "caff"`, `data-share = 0.5`, `data-selection = "entropy"`: half of the examples, those of highest entropy under the global model, whose forward pass over all of them is charged. The paper trains a fixed upper part of the model. |
| FedAvgM (Hsu et al., 2019, arXiv 1909.06335) | `server-optimizer = "fedavgm"`, moments per slice |
| FedAdam, FedYogi (Reddi et al., ICLR 2021, arXiv 2003.00295) | `server-optimizer = "fedadam"` or `"fedyogi"`, `server-lr = 0.01` or so; moments per slice, no bias correction, as in the paper |
| FedIT (Zhang et al., ICASSP 2024, arXiv 2305.05644) | `tuning = "lora"` |
| FeDeRA (Yan et al., 2024, arXiv 2404.18848) | `tuning = "lora"`, `lora-init = "federa"` |
| SLoRA (Babakniya et al., 2023, arXiv 2308.06522) | `tuning = "lora"`, `slora-rounds = 3` |
| RoLoRA (Chen et al., 2024, arXiv 2409.02346) | `tuning = "lora"`, `lora-aggregation = "alternate"` |
| FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313) | `tuning = "lora"`, `lora-aggregation = "freeze-a"` |
| FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976) | `tuning = "lora"`, `lora-aggregation = "stack"` |
| FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505) | `tuning = "lora"`, `lora-aggregation = "product"`, `lora-ranks = "2, 4"` |
"""  # noqa: E501


def to_markdown(found: list[Strategy]) -> str:
    """Return the page of strategies in Markdown."""
    rows = [f"| [`{m.name}`](#{m.name}) | {m.summary} | {m.kept} |" for m in found]
    sections = [
        f"## {m.name}\n\n{m.text}\n\n" + (f"*{m.paper}*\n\n" if m.paper else "") for m in found
    ]
    return (
        _HEAD
        + "\n".join(["| strategy | | budgets kept |", "| --- | --- | --- |", *rows])
        + ("\n\n" + "".join(sections) + _TAIL)
    )
