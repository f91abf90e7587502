"""The reference decoder: transformers' `generate` under the grammar, one token at a time."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..answer.grammar import ActionGrammar
from ..model.backbones import Backbone


class GrammarProcessor(LogitsProcessor):
    """Leaves only the tokens that the grammar allows after each row's answer so far.

    Temperature and noise are those of `Decoder.__call__`: the noise makes greedy generation sample.
    """

    def __init__(
        self, grammar: ActionGrammar, prompt_length: int, temperature: float, noise: Tensor | None
    ) -> None:
        self._grammar = grammar
        self._prompt_length = prompt_length
        self._temperature = temperature
        self._noise = noise
        # How many answer tokens precede each choice. All tokens between two choices are forced.
        depth = len(grammar.opening)
        self._level_at: dict[int, int] = {}
        for i, level in enumerate(grammar.levels):
            self._level_at[depth] = i
            depth += 1 + len(level.forced)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, -torch.inf)
        answers = input_ids[:, self._prompt_length :].tolist()
        for row, answer in enumerate(answers):
            allowed = self._grammar.allowed(answer)
            chosen = scores[row, allowed].float()
            level = self._level_at.get(len(answer))
            if self._noise is not None and level is not None:
                tokens = self._grammar.levels[level].tokens
                place = torch.searchsorted(tokens, torch.tensor(allowed))
                chosen = chosen / self._temperature + self._noise[row, level, place.to(chosen.device)]
            out[row, allowed] = chosen.to(out.dtype)
        return out


def generate_answers(
    backbone: Backbone,
    text: str,
    grammar: ActionGrammar,
    images: Tensor,
    temperature: float,
    noise: Tensor | None,
) -> Tensor:
    """Answer tokens int64[B, grammar.max_length] for uint8 images [B, 3, H, W]."""
    inputs = _inputs(backbone, text, images)
    prompt_length = inputs["input_ids"].shape[1]
    config = GenerationConfig(
        max_new_tokens=grammar.max_length,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=grammar.eos_token_id,
        pad_token_id=grammar.pad_token_id,
    )
    processors = LogitsProcessorList([GrammarProcessor(grammar, prompt_length, temperature, noise)])
    model = backbone.base  # without peft's wrapper, which has another generation config
    # `generate` takes settings that its config leaves open from the model's own config. Checkpoints put
    # penalties, forbidden tokens, sampling and more there, which would change the answers.
    own, model.generation_config = model.generation_config, config
    try:
        out = model.generate(**inputs, generation_config=config, logits_processor=processors)
    finally:
        model.generation_config = own
    answers = out[:, prompt_length:]
    missing = grammar.max_length - answers.shape[1]
    return torch.nn.functional.pad(answers, (0, missing), value=grammar.pad_token_id)


def next_token_log_probs(
    backbone: Backbone, text: str, grammar: ActionGrammar, image: Tensor, answer: list[int]
) -> dict[int, float]:
    """log p of each token that the grammar allows after `answer`, the beginning of one, normalized over them;
    for an image uint8[1, 3, H, W]."""
    inputs = _inputs(backbone, text, image)
    added = torch.tensor([answer], dtype=torch.int64, device=backbone.device)
    fills = {"input_ids": added, "attention_mask": torch.ones_like(added)}
    fills["mm_token_type_ids"] = torch.zeros_like(added)  # of text
    for name in fills.keys() & inputs.keys():
        inputs[name] = torch.cat((inputs[name], fills[name]), 1)
    allowed = grammar.allowed(answer)
    logits = backbone.base(**inputs).logits[0, -1, allowed].float()
    return dict(zip(allowed, logits.log_softmax(0).tolist(), strict=True))


def _inputs(backbone: Backbone, text: str, images: Tensor) -> dict[str, Tensor]:
    """The arguments of transformers' model."""
    return {
        name: value.to(backbone.device, backbone.dtype if value.is_floating_point() else None)
        for name, value in backbone.process(text, images).items()
    }
