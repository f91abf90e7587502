"""The model card of a saved prior: README.md with the header that the Hugging Face Hub reads.

It is made from the files in the folder, so that it can be written for any folder at any time. Who knows more,
such as the run that tuned the model, adds sections.
"""

from pathlib import Path
from typing import Any

from ...files import write_whole
from ..answer.prompt import default_prompt, format_action
from .folder import ADAPTER_FILE, CARD_FILE, CARD_TAG, NANO_BASE
from .hub import is_hub_id
from .loading import Settings

_PLACE = 'folder = "."'
_LICENCE = ("license", "license_name", "license_link")


def write_card(folder: Path, *sections: str, frame: tuple[int, int] = (84, 84)) -> None:
    """Writes README.md for the saved prior in `folder`. `sections` are Markdown, each with a heading; `frame`
    is the (height, width) of the frames in the example."""
    settings = Settings.load(folder)
    assert settings is not None
    adapted = (folder / ADAPTER_FILE).is_file()
    base = _card_of(settings.base)
    header = {name: base[name] for name in _LICENCE if base.get(name)}
    if is_hub_id(settings.base):
        header["base_model"] = settings.base
    text = "\n\n".join(
        [
            f"# {'LoRA adapter' if adapted else 'Weights'} of a model that answers with actions",
            "This vision-language model looks at a frame and answers with an action. An agent that learns by "
            "trial and error chose what it was tuned on. The method is COVR "
            "([Xia et al. 2026](https://arxiv.org/abs/2601.06122)), the program covr_fast.",
            _task(settings),
            *sections,
            _use(settings, frame, adapted=adapted),
            _base(settings.base, header, adapted=adapted),
            "## Limits\n\nThe model was tuned for this task alone. It was not tested on other tasks, other "
            "pictures or frame sizes, not as a chat model, and not for safety: let it control nothing real. "
            "covr_fast allows only well-formed answers; other programs do not.",
        ]
    )
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **header,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[CARD_TAG, "reinforcement-learning", *(["lora"] if adapted else [])],
    )
    write_whole(folder / CARD_FILE, f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def card_for_hub(card: str, repo: str, base: str, base_there: str) -> str:
    """The same card, where the model is `repo` on the hub, and its base, known as `base` so far, is
    `base_there`. What a user has added stays."""
    from huggingface_hub import ModelCard

    card = card.replace(_PLACE, f'folder = "{repo}"')
    if base_there == base:
        return card
    renamed = ModelCard(card.replace(_described(base), _described(base_there)), ignore_metadata_errors=True)
    renamed.data["base_model"] = base_there
    return str(renamed)


def _task(settings: Settings) -> str:
    count = "one number" if settings.action_dim == 1 else f"{settings.action_dim} numbers"
    prompt = settings.prompt or default_prompt(settings.action_dim, settings.decimals)
    example = format_action(([0.4, -0.3] * settings.action_dim)[: settings.action_dim], settings.decimals)
    answer = f"The answer is {count} in [-1, 1] in steps of {10**-settings.decimals:g}, for example"
    text = f"## Task\n\nThe prompt, before the frame:\n\n{_quoted(prompt)}\n\n{answer} `{example}`."
    if settings.image_size:
        text += f" The longer side of a frame is resized to {settings.image_size} pixels."
    return text


def _use(settings: Settings, frame: tuple[int, int], *, adapted: bool) -> str:
    code = f"""import torch
from covr_fast.vlm import ActionPrior

{_PLACE}  # or the name of this model on the hub
prior = ActionPrior.from_pretrained(folder, action_dim={settings.action_dim})
frames = torch.zeros(1, 3, {frame[0]}, {frame[1]}, dtype=torch.uint8)  # like those in training
answer = prior(frames)
print(answer.text, answer.action)"""
    blocks = ["## Use", f"```python\n{code}\n```"]
    if adapted and is_hub_id(settings.base):
        code = f"""from peft import PeftModel
from transformers import AutoModelForImageTextToText

{_PLACE}
base = AutoModelForImageTextToText.from_pretrained("{settings.base}")
model = PeftModel.from_pretrained(base, folder)"""
        blocks += ["With peft alone, where any text may be the answer:", f"```python\n{code}\n```"]
    return "\n\n".join(blocks)


def _base(base: str, header: dict[str, Any], *, adapted: bool) -> str:
    relation = "The adapter needs its base" if adapted else "The weights are those of the base, tuned"
    named = _described(base)
    licence = header.get("license_name") or header.get("license")
    if licence:
        terms = f"The base's licence is `{licence}`"
        terms += f" ({header['license_link']})." if header.get("license_link") else "."
        terms += " It holds for what is made from the base too, as far as it says so."
    elif base == "nano":
        terms = "It has no licence of its own."
    else:
        terms = "No licence was found with the base: look there before you share this model."
    return f"## Base and licence\n\n{relation}: {named}. {terms}"


def _described(base: str) -> str:
    if base == "nano":
        return (
            "nano, a small random model of covr_fast, which was trained on no text and no pictures (beside "
            f"an adapter in the folder `{NANO_BASE}`)"
        )
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return f"a model in a folder named `{Path(base).name}`, which is not on the hub under a known name"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def _card_of(model: str) -> dict[str, Any]:
    """The header of a model's own card; empty if there is none on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    path: Any = Path(model) / CARD_FILE
    if is_hub_id(model) and not path.is_file():
        path = try_to_load_from_cache(model, CARD_FILE)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        header: dict[str, Any] = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # written by people: any error in its YAML
        return {}
    return header
