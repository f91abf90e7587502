"""Which attention implementation is taken, with faked packages and GPUs. What is faked of a package is what
transformers looks at: a module and the metadata."""

import pytest
import torch
from tiny import make_nano
from transformers.utils import import_utils

from covr_fast.vlm.model.attention import choose_attention

CUDA = torch.device("cuda")
A100, H100, B200 = (8, 0), (9, 0), (10, 0)
CHECKS = (
    import_utils.is_flash_attn_2_available,
    import_utils.is_flash_attn_3_available,
    import_utils.is_flash_attn_4_available,
    import_utils.is_torch_cuda_available,
    import_utils._package_distribution_mapping,
)
PACKAGES = {
    # name: (version, files)
    "flash-attn": ("2.8.3", ["flash_attn/__init__.py", "flash_attn/cute/__init__.py"]),
    "flash-attn-3": ("3.0.0", ["flash_attn_interface.py"]),
    "flash-attn-4": ("4.0.0b36", ["flash_attn/cute/__init__.py"]),
}


def forget() -> None:
    for check in CHECKS:
        if hasattr(check, "cache_clear"):
            check.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Fakes a machine with a GPU of this compute capability and these packages."""

    def build(capability: tuple[int, int], *packages: str) -> None:
        for name in packages:
            version, files = PACKAGES[name]
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "top_level.txt").write_text(files[0].split("/")[0].removesuffix(".py") + "\n")
            (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
            for file in files:
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        forget()

    yield build
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(
    "capability, packages, expected",
    [
        (A100, [], "sdpa"),
        (A100, ["flash-attn"], "flash_attention_2"),
        (A100, ["flash-attn-4"], "sdpa"),
        (A100, ["flash-attn-3"], "sdpa"),
        (A100, ["flash-attn", "flash-attn-4"], "flash_attention_2"),
        (H100, ["flash-attn"], "flash_attention_2"),  # it contains flash_attn/cute, as version 4 does
        (H100, ["flash-attn-4"], "flash_attention_4"),
        (H100, ["flash-attn", "flash-attn-4"], "flash_attention_4"),
        (H100, ["flash-attn", "flash-attn-3"], "flash_attention_3"),
        (B200, ["flash-attn", "flash-attn-3"], "flash_attention_2"),
        (B200, ["flash-attn-4"], "flash_attention_4"),
    ],
)
def test_auto_takes_the_newest_that_runs(machine, capability, packages, expected):
    machine(capability, *packages)
    assert choose_attention("auto", CUDA, torch.bfloat16).name == expected


def test_the_reason_names_every_obstacle(machine):
    machine(A100, "flash-attn-4")
    assert choose_attention("auto", CUDA, torch.bfloat16).reason == (
        "flash_attention_4: it needs compute capability at least 9.0, and the GPU has 8.0; "
        "flash_attention_3: it needs compute capability at least 9.0 and below 10.0, and the GPU has 8.0; "
        "flash_attention_2: flash-attn is not installed"
    )


def test_a_version_of_2_that_transformers_does_not_take(machine, monkeypatch):
    monkeypatch.setitem(PACKAGES, "flash-attn", ("2.3.0", PACKAGES["flash-attn"][1]))
    machine(H100, "flash-attn")
    assert choose_attention("auto", CUDA, torch.bfloat16).name == "sdpa"


def test_no_flash_attention_in_float32_or_on_the_cpu(machine):
    machine(H100, "flash-attn-4")
    assert choose_attention("auto", CUDA, torch.float32).name == "sdpa"
    chosen = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert (chosen.name, chosen.reason) == (
        "sdpa",
        "FlashAttention cannot run: the device is cpu, not cuda",
    )


def test_a_request_is_taken_or_refused_with_the_reason(machine):
    machine(H100, "flash-attn")
    assert choose_attention("flash_attention_2", CUDA, torch.float16).name == "flash_attention_2"
    assert choose_attention("eager", CUDA, torch.float32).name == "eager"
    with pytest.raises(ValueError, match="flash-attn-4 is not installed; use attention='auto'"):
        choose_attention("flash_attention_4", CUDA, torch.float16)
    with pytest.raises(ValueError, match="is not one of auto"):
        choose_attention("flash", CUDA, torch.float16)


def test_a_prior_tells_its_reason():
    assert make_nano().backbone.attention_reason == "FlashAttention cannot run: the device is cpu, not cuda"
    assert make_nano(attention="eager").backbone.attention_reason == "as asked"
