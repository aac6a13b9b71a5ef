"""Why tests of other projects do not pass on simulated cards, test by test.

A reason that no longer holds for any test is an error of the run that finds it.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Reason(NamedTuple):
    """Why tests do not pass.

    Attributes:
        suite: The suite.
        tests: Which tests: an expression that is found in their names.
        words: An expression that is found in their errors.
        text: The reason, a sentence for the page.
        kind: Which kind of outcome it is, of ``verdicts.KINDS``.
    """

    suite: str
    tests: str
    words: str
    text: str
    kind: str = "explained"


REASONS: Final[tuple[Reason, ...]] = (
    Reason(
        "accelerate",
        "test_saved_activations_move_to_host",
        "offload held",
        "compares two runs, of which the first takes cuBLAS's workspace unless a test "
        "before it has; the plugin clears workspaces between tests, so it fails as it "
        "does alone on a card",
    ),
    Reason(
        "accelerate",
        "test_free_memory_dereferences_prepared_components",
        "assert [0-9]+ <=",
        "measures the free memory of the whole host, on which other programs ran",
    ),
    Reason(
        "Lightning",
        "test_get_nvidia_gpu_stats",
        "nvidia-smi: command not found",
        "starts `nvidia-smi`, a program of the driver, which is not there",
    ),
    Reason(
        "peft",
        "test_boft_",
        "not done after|fbd_cuda",
        "builds an extension of CUDA code before anything else",
        "kernels",
    ),
    Reason(
        "transformers",
        "test_flex_attention_with_grads",
        "not linked with support for cuda",
        "compiles flex attention into a kernel for a card",
        "kernels",
    ),
    Reason(
        "transformers",
        "T5Test::test_flex_attention_with_grads",
        "decoder_attention_mask",
        "wants an input that the small models here are not given",
    ),
)
