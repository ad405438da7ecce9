"""Options of what is learnt, from which data, and how clients train."""

from dataclasses import dataclass

from d2ft_fl.config.choices import (
    BAD_EXAMPLES,
    DATA_SELECTIONS,
    EMBEDDED_DATASETS,
    LORA_AGGREGATIONS,
    LORA_INITS,
    LR_SCHEDULES,
    OPTIMIZERS,
    PRECISIONS,
    PRETRAINED,
)
from d2ft_fl.config.option import option


@dataclass(frozen=True)
class FederationOptions:
    """Federation."""

    strategy: str = option(
        "d2ft",
        "Strategy that decides which client runs which heads: a name that `d2ft strategies` lists, "
        "or the dotted path of a module of your own.",
    )
    rounds: int = option(
        10, "Rounds of asking, planning, training and aggregating.", low=1, unit="rounds"
    )
    clients: int = option(
        10,
        "Holders of data in the federation; independent of the number of SuperNodes.",
        low=1,
        unit="clients",
    )
    sample_clients: int = option(
        0, "Clients that take part in a round, drawn by the seed; 0 for all.", low=0, unit="clients"
    )
    seed: int = option(
        0,
        "Seed of partitions, order of examples, initial classifier and all other draws.",
        low=0,
    )


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    dataset: str = option(
        "digits",
        "Data set: the embedded digits, made-up noise, hub:OWNER/NAME, or a folder of parquet "
        "files or of images in one folder a class.",
        no_path=EMBEDDED_DATASETS,
    )
    label_column: str = option(
        "label", "Column that has the class of an example; fine_label for CIFAR-100."
    )
    image_column: str = option(
        "", "Column that has the images; empty for the only one, or the first of several."
    )
    classes: str = option(
        "",
        'Names of the classes in the order of their numbers, like "cat, dog", or as the text of a '
        "TOML array; empty for those of the data set. Devices with data of their own need it.",
    )
    test_split: str = option(
        "",
        "Split that is held out; empty for test, else validation, else a fifth of the training "
        "split.",
    )
    bad_examples: str = option(
        "leave-out",
        "What becomes of images that cannot be decoded: they are left out and counted, or stop the "
        "run before it begins.",
        choices=BAD_EXAMPLES,
    )
    partitioner: str = option(
        "Dirichlet",
        "How examples are divided over clients: any partitioner of flwr-datasets by name, or all "
        "to give everyone everything.",
    )
    partitioner_args: str = option("alpha = 0.5", "Parameters of the partitioner, as TOML pairs.")
    train_examples: int = option(
        0, "Size of a seeded sample of the training split; 0 takes all.", low=0, unit="examples"
    )
    test_examples: int = option(
        0, "Size of a fixed sample of the held-out split; 0 takes all.", low=0, unit="examples"
    )
    data_share: float = option(
        1.0, "Share of its examples that a client trains on in a round.", above=0, high=1
    )
    data_selection: str = option(
        "random",
        "How the examples of a data-share below 1 are chosen: drawn anew each round, or those of "
        "highest entropy under the global model (FedFT-EDS, Shi et al., 2024, arXiv 2501.00170).",
        choices=DATA_SELECTIONS,
    )
    selection_temperature: float = option(
        0.1,
        "Temperature of the softmax whose entropy chooses examples (data-selection = entropy); "
        "below 1 hardens it.",
        above=0,
    )


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model: str = option(
        "vit_glyphs", "Model: the bundled vit_glyphs, or any plain timm ViT (vit_*, deit_*)."
    )
    model_args: str = option("", "More arguments of timm.create_model, as TOML pairs.")
    pretrained: str = option(
        "bundled",
        "Where initial weights come from: bundled, hub, none, or the path of a safetensors file.",
        no_path=PRETRAINED,
    )
    image_size: int = option(
        0,
        "Side of the images that the model sees; 0 keeps the model's own.",
        low=0,
        unit="pixels",
    )


@dataclass(frozen=True)
class TuningOptions:
    """Tuning and LoRA."""

    tuning: str = option(
        "full",
        "What trains of the heads that a client was assigned: full, lora, or the dotted path of a "
        "module of your own. All options that begin with lora- or slora- need lora.",
    )
    lora_rank: int = option(8, "Rank of every LoRA factor.", low=1)
    lora_ranks: str = option(
        "",
        'Smaller ranks that the planner may give a head, like "2, 4"; needs lora-aggregation = '
        "product or stack.",
        read_by="lora",
    )
    lora_rank_exponent: float = option(
        0.5,
        "Exponent of the utility of a smaller rank r, which is (r / lora-rank) to this power.",
        low=0,
    )
    lora_alpha: float = option(
        8.0, "Scale of LoRA: the product of two factors counts alpha / rank.", above=0
    )
    lora_targets: str = option(
        "qkv, proj, fc1, fc2", "Linear layers of a block that have LoRA factors."
    )
    lora_dropout: float = option(
        0.0, "Probability of dropping an element of what goes into a factor A.", low=0, below=1
    )
    lora_rslora: bool = option(
        False, "Whether products of factors count alpha / sqrt(rank) instead of alpha / rank."
    )
    lora_init: str = option(
        "lora",
        "How factors begin: lora (A drawn, B zero), or federa (from the largest singular values "
        "of the weights; Yan et al., 2024, arXiv 2404.18848).",
        choices=LORA_INITS,
    )
    lora_aggregation: str = option(
        "factors",
        "How clients' factors become one: factors (means of A and of B), freeze-a (FFA-LoRA), "
        "alternate (RoLoRA), freeze-common, product (FlexLoRA) or stack (FLoRA).",
        choices=LORA_AGGREGATIONS,
    )
    lora_error: bool = option(
        True,
        "Whether to measure how far the aggregate of factors is from the exact mean, which takes "
        "seconds a client with a large model.",
    )
    lora_adapter: str = option(
        "",
        "Folder of a peft adapter to begin from; empty for none.",
        no_path=("",),
        read_by="lora",
    )
    lora_lr: float = option(2e-3, "Learning rate of the LoRA factors.", low=0)
    slora_rounds: int = option(
        0,
        "Rounds of sparse full tuning before LoRA, whose change begins the factors (SLoRA, "
        "Babakniya et al., 2023, arXiv 2308.06522).",
        low=0,
        unit="rounds",
        read_by="lora",
    )


@dataclass(frozen=True)
class LocalTrainingOptions:
    """Local training."""

    batch_size: int = option(16, "Examples of one optimizer step.", low=1, unit="examples")
    epochs: int = option(1, "Epochs that a client trains in a round.", low=1, unit="epochs")
    optimizer: str = option("adamw", "Optimizer of the clients.", choices=OPTIMIZERS)
    lr: float = option(
        5e-4, "Learning rate of everything but the final norm, the classifier and LoRA.", low=0
    )
    head_lr: float = option(2e-3, "Learning rate of the final norm and the classifier.", low=0)
    lr_schedule: str = option(
        "constant",
        "How all learning rates change over the rounds: constant, or linear or cosine down to 0.",
        choices=tuple(LR_SCHEDULES),
    )
    logit_adjustment: float = option(
        0.0,
        "Factor of the log of each label's share of the client's examples, which is added to the "
        "logits in the loss; at 1 the model need not learn which labels a client happens to have "
        "(Menon et al., ICLR 2021, arXiv 2007.07314, equation 10; FedLC, Zhang et al., ICML 2022, "
        "arXiv 2209.00189).",
        low=0,
    )
    momentum: float = option(0.9, "Momentum of the clients' sgd.", low=0)
    weight_decay: float = option(0.0, "Weight decay of everything that trains.", low=0)
    precision: str = option(
        "fp32",
        "Type of products and activations: float32, or bfloat16 with weights, gradients and sums "
        "in float32, as torch's autocast does it.",
        choices=PRECISIONS,
    )
    checkpointing: bool = option(
        False,
        "Whether activations are computed once more in the backward pass instead of kept: less "
        "memory for more FLOPs (Chen et al., 2016, arXiv 1604.06174).",
    )
    micro_batches: int = option(
        1,
        "Parts that a batch is run in, one after another, their gradients added up: less memory "
        "for more time.",
        low=1,
    )
    proximal: float = option(
        0.0,
        "mu of FedProx: the loss grows by mu / 2 times the squared distance of what trains from "
        "where it began (Li et al., MLSys 2020, arXiv 1812.06127, equation 2); 0 for none.",
        low=0,
    )
    compensation: bool = option(
        False, "Whether a skipped head's mean contribution is added in its place."
    )
