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
        varies: Whether the tests may pass, by what else the machine does.
    """

    suite: str
    tests: str
    words: str
    text: str
    kind: str = "explained"
    varies: bool = False


REASONS: Final[tuple[Reason, ...]] = (
    Reason(
        "accelerate",
        "test_saved_activations_move_to_host",
        "offload held",
        "compares two runs; only the first makes cuBLAS's workspace, unless an earlier "
        "test has made it. The plugin clears workspaces between tests, so the test fails, "
        "as it does on a card if it runs alone",
    ),
    Reason(
        "accelerate",
        "test_free_memory_dereferences_prepared_components",
        "assert [0-9]+ <=",
        "measures the free memory of the whole host, on which other programs ran",
        varies=True,
    ),
    Reason(
        "peft",
        "TestLoraTensorParallel",
        "",
        "needs two cards, though its mark asks for one, and files of the hub",
        "hub",
    ),
    Reason(
        "peft, several cards",
        "TestLoraTensorParallel",
        "",
        "needs two cards, though its mark asks for one, and files of the hub",
        "hub",
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
        "needs an input that the small models here do not get",
    ),
)
