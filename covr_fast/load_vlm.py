"""The VLM of a run as its settings ask for it: as the run begins, and with the weights of a round."""

from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .config import TrainConfig
from .errors import UserError, as_user_error
from .files import read_json
from .parts import compute_device, loop_threads, use_tensor_cores
from .tasks import find_task
from .versions import RoundWeights
from .vlm import ActionPrior, VLMTuner, task_prompt
from .words import MOTION_WORDS


def task_words(config: TrainConfig) -> str:
    """The prompt of the run's task and of its pictures."""
    words = find_task(config.env).words
    shown = f"{words.prompt} {MOTION_WORDS}" if config.vlm.motion else words.prompt
    return task_prompt(shown, len(words.action_names), config.vlm.decimals)


def load_prior(config: TrainConfig, action_dim: int, device: torch.device, model: str | Path) -> ActionPrior:
    """The VLM in `model` with the settings of config.vlm.

    Without vlm.prompt, the model with which a run begins is told the task, and one in a run's checkpoint what
    it was tuned with.

    Raises:
        UserError: one of its files is damaged. For other errors see ActionPrior.from_pretrained.
    """
    prompt = config.vlm.prompt
    if prompt is None and str(model) == str(config.vlm.model):
        prompt = task_words(config)
    try:
        return ActionPrior.from_pretrained(
            model,
            action_dim=action_dim,
            prompt=prompt,
            decimals=config.vlm.decimals,
            image_size=config.vlm.image_size,
            attention=config.vlm.attention,
            dtype=None if config.vlm.dtype == "auto" else getattr(torch, config.vlm.dtype),
            device=device,
            seed=config.seed,
            quantization=None if config.vlm.quantization == "auto" else config.vlm.quantization,
            graph=None if config.vlm.graph else False,
        )
    except (OSError, ValueError, RuntimeError, MemoryError):
        raise
    except Exception as error:  # safetensors and tokenizers report damaged files by their own exceptions
        raise UserError(f"{model} cannot be opened: {' '.join(str(error).split())}") from error


def load_round(config: TrainConfig, saved: Checkpoint, weights: RoundWeights) -> ActionPrior:
    """The VLM of a run with the weights of a round, to answer as it did in the run: with its threads and
    precision, and on the device of the run if this machine has it.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        device = compute_device(config.device)
    except UserError:
        device = compute_device("auto")
    use_tensor_cores(device)
    torch.set_num_threads(loop_threads(config))
    if not config.has_rounds:
        with as_user_error():
            return load_prior(config, find_task(config.env).action_dim, device, weights.model)
    # What the run left open, it has settled: the words of its prompt, and the dtype on its device.
    settings = read_json(saved.vlm / "action_prior.json", "put back a copy of the checkpoint")
    dtype = settings["dtype"] if config.vlm.dtype == "auto" else config.vlm.dtype
    config = replace(config, vlm=replace(config.vlm, prompt=settings["prompt"], dtype=dtype))
    with as_user_error():
        prior = load_prior(config, settings["action_dim"], device, weights.model)
        VLMTuner(prior, config.tuner)  # it adds LoRA to the model, or merges it, and so changes rounding
    prior.version = weights.version
    return prior
