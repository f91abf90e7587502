"""The settings of fine-tuning."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TunerConfig:
    """How a round of fine-tuning runs. Every round starts a new AdamW and a new learning-rate curve."""

    mode: Literal["lora", "full"] = "lora"
    """Train low-rank adapters of the language model's linear layers, or every weight."""
    lora_rank: int = 128
    """Rank of the adapters."""
    lora_alpha: int = 256
    """Scale of the adapters, as alpha / rank: the paper's 256 for driving, 16 for DMControl."""
    learning_rate: float = 2e-4
    """Peak of the curve: linear warm-up, then half a cosine down to zero."""
    warmup: float = 0.1
    """Share of the steps spent warming up."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""
    epochs: int = 3
    """Passes over the round's samples."""
    average: float = 0.0
    """Decay per step of a moving average of the weights, in which the noise of small batches cancels. The
    average starts at the round's first weights; it is evaluated and published. 0 for no average."""
    max_steps: int | None = None
    """Upper limit of optimizer steps in a round; None for none."""
    batch_size: int = 64
    """Samples per optimizer step. Those with zero weight count in N_v and cost nothing."""
    micro_batch: int = 16
    """Samples per forward. Lower it when memory runs out: the result is the same."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Put answers of different lengths one after the other instead of padding them. Then only attention sees
    padding, with FlashAttention not even that. The result is the same up to rounding. auto: pack, except with
    eager attention, which does not support it. on: fail where packing is not supported. off: pad, which
    FlashAttention does not support."""
    held_out: float = 0.1
    """Share of the samples that is not trained on and gives the reported losses. Whole episodes are held out,
    at least one if there are two, but never that of the sample with the highest return: with few episodes the
    share may be larger. 0 for none: then the weights of the last epoch stay."""
    label_smoothing: float = 0.1
    """Probability mass spread over the vocabulary in the training loss. The reported losses have none."""
    shift: int = 0
    """Random shift of the frames in training, in pixels each way, for rounds of few samples; 0 for none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cache_image_features: bool = True
    """Run the vision tower once per frame and round if it is frozen (mode "lora", unless the prior's adapter
    changes it) and frames are not shifted. The result is the same; the features take memory."""
    overlap: bool = False
    """Train in a separate thread, while the prior answers and the agent learns."""
    seed: int | None = None
    """Seed of the held-out samples, of the order of samples and of the adapters' initial weights. None: that
    of the run."""

    def __post_init__(self) -> None:
        if self.mode not in ("lora", "full"):
            raise ValueError(f"mode must be 'lora' or 'full', not {self.mode!r}")
        if self.packing not in ("auto", "on", "off"):
            raise ValueError(f"packing must be 'auto', 'on' or 'off', not {self.packing!r}")
        for name in ("lora_rank", "lora_alpha", "epochs", "batch_size", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1 or None, not {self.max_steps}")
        for name in ("held_out", "label_smoothing", "warmup", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.shift < 0:
            raise ValueError(f"shift must be at least 0, not {self.shift}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
