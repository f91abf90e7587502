"""The batched pixel values against those of transformers' image processors."""

import json

import pytest
import torch
from test_resample import adversarial
from tiny import open_prior, random_frames, write_checkpoint
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from covr_fast.vlm.model.patches import PatchPixels
from covr_fast.vlm.model.pixels import FramePixels

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PROCESSORS = {
    "llava-1.5": lambda: CLIPImageProcessorPil(**SQUARE),
    "llava": lambda: LlavaImageProcessorPil(**SQUARE),
    "clip, all settings others": lambda: CLIPImageProcessorPil(
        size={"height": 90, "width": 70},
        crop_size={"height": 51, "width": 48},
        resample=1,
        do_normalize=False,
        rescale_factor=0.01,
    ),
    "clip, bytes": lambda: CLIPImageProcessorPil(do_rescale=False, do_center_crop=False),
    "smolvlm, a quarter": lambda: smolvlm(512, 128),
    "smolvlm, smaller": lambda: smolvlm(50, 64),
    "qwen2.5-vl": lambda: Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2),
    "qwen3-vl": lambda: Qwen2VLImageProcessorPil(patch_size=16, size=qwen3_limits(), **HALF),
}


def smolvlm(largest: int, tower: int, **options) -> SmolVLMImageProcessorPil:
    edges = {"size": {"longest_edge": largest}, "max_image_size": {"longest_edge": tower}}
    return SmolVLMImageProcessorPil(**edges, **{"do_image_splitting": False} | HALF | options)


def qwen3_limits() -> dict[str, int]:
    return {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}


def check(processor, frames: torch.Tensor) -> None:
    """Every byte is the processor's: one level more would be 1,000 times the tolerance."""
    ours = (PatchPixels if hasattr(processor, "merge_size") else FramePixels)(processor)(frames)
    nested = [[frame] for frame in frames.permute(0, 2, 3, 1).numpy()]
    theirs = processor(images=nested, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(84, 84), (60, 84), (120, 50)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(name, size):
    check(PROCESSORS[name](), adversarial(*size))


@pytest.mark.parametrize("edges", [(2048, 512), (1536, 384)])
def test_pixels_are_smolvlm2s(edges):
    """In the sizes of SmolVLM2-500M and -2.2B."""
    check(smolvlm(*edges), adversarial(84, 84)[:3])


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda: CLIPImageProcessorPil(resample=2), "CLIPImageProcessor with resample=2"),
        (lambda: CLIPImageProcessorPil(do_resize=False), "do_resize=False"),
        (lambda: CLIPImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 99}), "size="),
        (lambda: CLIPImageProcessorPil(size={"shortest_edge": 200}), "crop_size="),
        (lambda: LlavaImageProcessorPil(do_pad=True), "do_pad=True"),
        (lambda: smolvlm(512, 128, do_image_splitting=True), "do_image_splitting=True"),
        (SiglipImageProcessorPil, "SiglipImageProcessor is not supported"),
    ],
)
def test_what_is_not_supported_is_named(processor, message):
    with pytest.raises(ValueError, match=message):
        FramePixels(processor())


@pytest.mark.parametrize("option", [{"resample": 2}, {"do_resize": False}])
def test_a_qwen_that_is_not_supported_is_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}={next(iter(option.values()))}"):
        PatchPixels(Qwen2VLImageProcessorPil(**option))


@pytest.mark.parametrize(("name", "option"), [("llava", {"resample": 2}), ("smolvlm", {"resample": 2})])
def test_the_processor_makes_what_is_not_supported(name, option, tmp_path, caplog):
    checkpoint = write_checkpoint(name, tmp_path)
    file = checkpoint / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with caplog.at_level("WARNING", logger="covr_fast.vlm.model.backbones"):
        prior = open_prior(checkpoint)
    assert "one by one on the CPU" in caplog.text
    assert "resample=2" in caplog.text
    frames = random_frames((60, 84), 3)
    assert torch.equal(prior(frames).token_ids, prior.reference(frames).token_ids)


def test_supported_processors_are_not_called_in_answers(opened, monkeypatch):
    prior, frames = opened
    prior(frames)  # looks at the layout

    def called(*_args, **_options):
        raise AssertionError("the frames went through the processor")

    monkeypatch.setattr(type(prior.backbone.processor.image_processor), "__call__", called)
    prior(frames)
