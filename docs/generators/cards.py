"""The page of cards: the table, with totals that others published of the same cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from generators.markdown import DASH, page, table
from pytest_gpumem.cards import CARDS, SLICES, Card
from pytest_gpumem.sizes import format_size

PUBLISHED: Final = Path(__file__).parents[2] / "tests/published"
_BYTES: Final = {"B": 1, "MiB": 2**20, "GiB": 2**30}

_COLUMNS: Final = (
    "driver's name",
    "total",
    "others saw",
    "compute capability",
    "multiprocessors",
    "context",
)


def published_totals(key: str) -> list[int]:
    """Return the published totals of a card, in bytes."""
    seen = json.loads((PUBLISHED / "cards.json").read_text(encoding="utf-8"))
    return [
        round(float(each["total"]) * _BYTES[each["unit"]]) for each in seen.get(key, ())
    ]


def cards() -> str:
    """Return the page."""
    rows = [_row(key, card) for key, card in CARDS.items()]
    return page(
        [
            "# Cards\n\n"
            "These are the cards that `--gpu-card` and `find_card` know by name. Use the name in "
            "the first column or the driver's name; case, blanks, hyphens and words like "
            "NVIDIA do not matter. Any other card can be made up: "
            "`--gpu-card=16GiB,cc=8.6,sms=46`.",
            table(
                ["card", *_COLUMNS],
                rows,
            ),
            "**Total** is the total that the driver reports to CUDA: exact bytes if a published "
            "output shows them; `≈` marks a total that is known in whole MiB or to 0.01 GiB. "
            "**Others saw**: the smallest and the largest total in public issues, logs and "
            "data sets (`tests/published/cards.json` names each source). The total of one "
            "kind of card differs by up to 5 % with the driver, the system (Windows shows "
            "more) and error correction. If you need the exact bytes of your card, make it "
            "up.",
            "**Context** is the memory that a process's CUDA context takes, from the first "
            "use of the card until the process ends. Free memory, NVML and OOM texts count "
            "it. It is modelled, not measured: 36 MiB plus 2.18 MiB for each 1,024 threads "
            "that can run at once. The model is fitted to the bytes that OOM texts of 21 "
            "kinds of cards count outside PyTorch (median error 5 %, worst 21 %). Kernels "
            "of other libraries, NCCL and old drivers without lazy loading take more. "
            "`--gpu-card=T4,ctx=135MiB` sets another size, `T4,ctx=0` none. A made-up card "
            "has no context unless `ctx=` gives its size. `nccl=200MiB` is the memory that "
            "each communicator of [NCCL](nccl.md) takes; the default is 0.",
            "## Slices (MIG)\n\n"
            "A slice of a card counts as a card: `--gpu-card=A100-80GB:1g.10gb`. Slices of "
            "one kind that follow each other are on one GPU, as far as it has room for "
            "them: seven slices of compute, eight of memory.",
            table(
                ["slice", *_COLUMNS],
                [_row(key, card) for key, card in SLICES.items()],
            ),
            "The totals and the multiprocessors are those that `nvidia-smi mig -lgip` "
            "prints in public outputs; they differ a little between drivers. The cache is "
            "the slice's share.",
            "- **CUDA**: a process sees every slice as a card, as since driver R570; "
            "`CUDA_VISIBLE_DEVICES` takes their numbers in CUDA's order, or their UUIDs "
            "(`MIG-…`). The names of drivers before R470 (`MIG-GPU-…/7/0`) show no card. Not "
            "known, and modelled: the UUID of a divided GPU (`GPU-…`) shows none of its "
            "slices.\n"
            "- **NVML** counts GPUs. A divided GPU has MIG mode 1, a handle for each slice, "
            "and the memory and processes of all its slices; its utilisation is “Not "
            "Supported”. torch counts GPUs through NVML until CUDA is initialised, so that "
            "`torch.cuda.device_count()` can grow then, as on a real machine. Ids of "
            "instances are modelled.\n"
            "- **nvidia-smi** lists slices with `-L` and in a table of their own. The "
            "engines that they share are not simulated.\n"
            "- **An OOM's text** lists processes. PyTorch asks the whole GPU for them, which "
            "a container is often not allowed to do; the OOM is then the error of "
            "[`flavour=nvml`](rules.md).",
            "## Cards without memory of their own\n\n"
            "GB10 (DGX Spark) and the Jetson modules use the host's memory: "
            "`get_device_properties(0).is_integrated` is 1. A GH200 is none of them: it has "
            "memory of its own, which CUDA and NVML report as that of any card.",
            "- **`torch.cuda.mem_get_info`** (like a card): the total is the host's memory. "
            "What this process holds in the host's memory is not free for the card, so that "
            "a model which is loaded on the host and copied takes its bytes twice. Counted "
            "are the process's own pages (`RssAnon`, `RssShmem` of `/proc/self/status`) "
            "less the values of tensors that are on simulated cards; 0 outside Linux. "
            "Not counted: files in the page cache, which a real card's free memory does not "
            "contain, and other processes.\n"
            "- **`--gpu-card=GB10,host=8GiB`** gives the host's part in place of the count: "
            "each run then has the same figures. A made-up card with `host=` is such a card: "
            "`--gpu-card=16GiB,cc=8.7,host=4GiB`.\n"
            "- **Budgets** (exact): `--gpu-budget` caps what PyTorch's allocator reserves, "
            "and the free memory, as on any card.\n"
            "- **NVML** (like a card): memory is “Not Supported”, and `nvidia-smi` prints "
            "`Not Supported` or `[N/A]`. GB10 lists processes with their bytes. A Jetson "
            "Orin (`Orin (nvgpu)` in NVML) lists none, and an OOM's text has none.\n"
            "- **The OOM of a Jetson**: until a change of July 2026 "
            "(pytorch/pytorch#185946) PyTorch fails an assertion when NVML lists no "
            "processes, and raises `RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT "
            "FAILED` in place of `OutOfMemoryError`. The simulated card raises the latter; "
            "try the former with [`flavour=nvml`](rules.md).\n"
            "- **Modelled**: the context, as for every card. Nobody has published that of "
            "these cards.\n"
            "- Sources: CUDA Runtime API, `cudaMemGetInfo`; DGX Spark User Guide, “Known "
            "Issues”; outputs and reports in public repositories "
            "(pytorch/pytorch#185240, XuehaiPan/nvitop#208, Andyyyy64/whichllm#165).",
        ]
    )


def _row(key: str, card: Card) -> list[str]:
    exact = card.precision_bytes == 1
    total = f"{card.total_bytes:,}" if exact else f"≈ {format_size(card.total_bytes)}"
    seen = published_totals(key)
    ends = dict.fromkeys(map(_gib, (min(seen), max(seen)))) if seen else [DASH]
    major, minor = card.compute_capability
    return [
        f"`{key}`",
        card.name,
        total,
        " to ".join(ends),
        f"{major}.{minor}",
        str(card.multi_processor_count),
        format_size(card.context_bytes),
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
