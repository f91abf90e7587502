"""Faults that are planted into copies of the kernels, to see that their tests find them without a GPU.

python faults.py OUT      writes OUT/NAME/FILE.cu for each
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels/cuda"


@dataclass(frozen=True)
class Fault:
    """`right`, which is in kernels/cuda/`file` once, is replaced by `wrong`, and `tests` must fail."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    """pytest's arguments: a few tests of that kernel."""

    def source(self) -> str:
        """The file with the fault.

        Raises:
            ValueError: the kernel has changed, and the fault cannot be planted.
        """
        source = (KERNELS / self.file).read_text()
        if (found := source.count(self.right)) != 1:
            raise ValueError(
                f"the fault {self.name!r} cannot be planted: kernels/cuda/{self.file} has {found} times what "
                f"it replaces; choose another place in tests/cuda_on_cpu/faults.py\n{self.right}"
            )
        return source.replace(self.right, self.wrong)


FAULTS = [
    Fault(
        "filter_reads_a_histogram_before_all_have_counted",
        "filter.cu",
        "  __syncthreads();  // histogram and selection are complete\n",
        "",
        ("tests/ops/test_filter.py", "-k", "test_cuda and ties"),
    ),
    Fault(
        "filter_appends_over_the_part_before",
        "filter.cu",
        "block_exclusive_sum(threadIdx.x < part ?",
        "block_exclusive_sum(threadIdx.x + 1 < part ?",
        ("tests/ops/test_filter.py", "-k", "test_cuda and large"),
    ),
    Fault(
        "returns_replace_a_map_that_others_still_read",
        "returns.cu",
        "    __syncthreads();\n    if (joins) maps",
        "    if (joins) maps",
        ("tests/ops/test_returns.py", "-k", "test_cuda and 300-33"),
    ),
    Fault(
        "weights_of_the_first_warp_of_a_block_only",
        "weights.cu",
        "threadIdx.x % 32 == 0",
        "threadIdx.x == 0",
        ("tests/ops/test_weights.py", "-k", "test_cuda"),
    ),
    Fault(
        "sum_tree_writes_before_all_have_claimed",
        "sum_tree.cu",
        "  entry.claim(update);\n  __syncthreads();\n",
        "  entry.claim(update);\n",
        ("tests/ops/test_sum_tree.py", "-k", "cuda_draws"),
    ),
    Fault(
        "pixels_end_at_the_width_in_both_directions",
        "pixels.cu",
        "clamp_to_image(y + shift.y, job.source.size.height)",
        "clamp_to_image(y + shift.y, job.source.size.width)",
        ("tests/ops/test_frames.py", "-k", "test_cuda"),
    ),
    Fault(
        "pixels_are_black_by_the_place_in_the_output",
        "pixels.cu",
        "bytes_inside(y + shift.y, x + shift.x,",
        "bytes_inside(y + shift.y, x,",
        ("tests/buffer/test_buffer_cuda.py", "-k", "either_layout and translate"),
    ),
    Fault(
        "pixels_are_written_before_all_are_interleaved",
        "pixels.cu",
        "    __syncthreads();\n    const uint32_t pixels",
        "    const uint32_t pixels",
        ("tests/buffer/test_buffer_cuda.py", "-k", "either_layout"),
    ),
    Fault(
        "gather_takes_the_frame_before",
        "gather.cu",
        "stack_slot(plans[row], frames.slots, stack - 1 - j)",
        "stack_slot(plans[row], frames.slots, stack - j)",
        ("tests/buffer/test_buffer.py", "-k", "other_types"),
    ),
    Fault(
        "sample_counts_the_batch_before_all_have_its_number",
        "sample.cu",
        "__device__ void count_batch(Sequence* sequence) {\n  __syncthreads();\n",
        "__device__ void count_batch(Sequence* sequence) {\n",
        ("tests/buffer/test_buffer_device.py", "-k", "batches_are_those"),
    ),
    Fault(
        "sample_plans_the_transition_after_the_last_step",
        "sample.cu",
        "tables.row(env, t + steps.steps - 1)",
        "tables.row(env, t + steps.steps)",
        ("tests/buffer/test_buffer_device.py", "-k", "batches_are_those"),
    ),
    Fault(
        "priorities_are_compared_before_all_are_known",
        "priorities.cu",
        "    __syncthreads();\n    if (threadIdx.x < distance)",
        "    if (threadIdx.x < distance)",
        ("tests/buffer/test_buffer_device.py", "-k", "batches_are_those and prioritized"),
    ),
    Fault(
        "priorities_of_the_latest_transition_that_is_gone_stay",
        "priorities.cu",
        "t < change.gone_end",
        "t + 1 < change.gone_end",
        ("tests/buffer/test_buffer_device.py", "-k", "batches_are_those and prioritized"),
    ),
    Fault(
        "add_knows_what_was_found_before_all_have_looked",
        "add.cu",
        "  if (own) atomicOr(&any, 1u);\n  __syncthreads();\n",
        "  if (own) atomicOr(&any, 1u);\n",
        ("tests/buffer/test_buffer_device_add.py", "-k", "no_number"),
    ),
    Fault(
        "add_skips_the_bytes_after_whole_vectors",
        "add.cu",
        "for (int32_t i = vectors * kVector + start; i < bytes; i += step) to[i]",
        "for (int32_t i = vectors * kVector + step + start; i < bytes; i += step) to[i]",
        ("tests/buffer/test_buffer_device_add.py", "-k", "images_are_stored"),
    ),
]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for old in folder.glob("*/*.cu"):
        if not any((fault.name, fault.file) == (old.parent.name, old.name) for fault in FAULTS):
            shutil.rmtree(old.parent)
    for fault in FAULTS:
        try:
            text = fault.source()
        except ValueError as error:  # test_faults.py fails by it; the kernels can be tried all the same
            print(error, file=sys.stderr)
            continue
        out = folder / fault.name / fault.file
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.is_file() or out.read_text() != text:  # what did not change is not compiled again
            out.write_text(text)
