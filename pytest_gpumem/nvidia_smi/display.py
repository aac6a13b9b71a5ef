"""The outputs of ``nvidia-smi``: its table, its list, its log of memory.

Source: the layout of ``nvidia-smi`` since version 545; older ones are narrower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.nvidia_smi.fields import mib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.nvidia_smi.card_status import CardNow

_WIDTH: Final = 89
#: Widths of the three columns of the table of cards.
_COLUMNS: Final = (41, 24, 22)
#: Longest names of a card and of a process that are shown in full.
_NAME_WIDTH: Final = 27
_PROCESS_WIDTH: Final = 36
_RULE: Final = "+" + "-" * _WIDTH + "+"
_HEAD: Final = (
    "| GPU  Name                 Persistence-M | Bus-Id          Disp.A "
    "| Volatile Uncorr. ECC |",
    "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage "
    "| GPU-Util  Compute M. |",
    "|                                         |                        "
    "|               MIG M. |",
)


def summary(
    cards: Sequence[CardNow], *, driver: str, cuda: str, date: str
) -> Iterator[str]:
    """Yield the lines of the table that the program draws without an option.

    Args:
        cards: The cards to show.
        driver: The driver's version.
        cuda: The newest CUDA version that it serves.
        date: The time, as ``ctime`` writes it.
    """
    yield f"{date}       "
    yield _RULE
    versions = f" {'NVIDIA-SMI ' + driver:<34}{'Driver Version: ' + driver:<31}"
    yield f"|{versions + 'CUDA Version: ' + cuda:<{_WIDTH}}|"
    between = "+".join("-" * width for width in _COLUMNS)
    yield f"|{between}|".replace("-|", "-+")
    yield from _HEAD
    yield "|" + "+".join("=" * width for width in _COLUMNS) + "|"
    for card in cards:
        name = card.card.name
        if len(name) > _NAME_WIDTH:
            name = name[: _NAME_WIDTH - 3] + "..."
        used = f"{mib(card.used_bytes)}MiB / {mib(card.total_bytes):>6}MiB"
        for line in (
            (
                f" {card.index:>3}  {name:<30} Off ",
                f"   {card.bus_id} Off ",
                f"{'N/A':>21} ",
            ),
            (" N/A   N/A   N/A             N/A /  N/A  ", f"{used:>23} ", _IDLE),
            (" " * 41, " " * 24, f"{'N/A':>21} "),
        ):
            yield (
                "|"
                + "|".join(
                    f"{text:<{width}.{width}}"
                    for text, width in zip(line, _COLUMNS, strict=True)
                )
                + "|"
            )
        yield "+" + "+".join("-" * width for width in _COLUMNS) + "+"
    yield " " * _WIDTH
    yield _RULE
    yield f"|{' Processes:':<{_WIDTH}}|"
    yield f"|{_PROCESSES:<{_WIDTH}}|"
    yield f"|{'        ID   ID' + ' ' * 63 + 'Usage':<{_WIDTH}}|"
    yield "|" + "=" * _WIDTH + "|"
    rows = [(card.index, each) for card in cards for each in card.processes]
    for index, each in rows:
        name = each.name
        if len(name) > _PROCESS_WIDTH:
            name = "..." + name[3 - _PROCESS_WIDTH :]
        row = f" {index:>4}   N/A  N/A  {each.pid:>14}      C   "
        held = mib(each.nbytes) + "MiB "
        yield f"|{row}{name:<{_PROCESS_WIDTH}}{held:>{_WIDTH - len(row) - _PROCESS_WIDTH}}|"
    if not rows:
        yield f"|{'  No running processes found':<{_WIDTH}}|"
    yield _RULE


_IDLE: Final = "      0%      Default "
_PROCESSES: Final = (
    "  GPU   GI   CI              PID   Type   Process name"
    "                        GPU Memory "
)


def listing(cards: Sequence[CardNow]) -> Iterator[str]:
    """Yield the lines of ``-L``."""
    for card in cards:
        yield f"GPU {card.index}: {card.card.name} (UUID: {card.uuid})"


def log(
    cards: Sequence[CardNow], *, driver: str, cuda: str, date: str
) -> Iterator[str]:
    """Yield the lines of ``-q``, which has the card's name and its memory here."""
    yield ""
    yield "==============NVSMI LOG=============="
    yield ""
    yield _entry("Timestamp", date)
    yield _entry("Driver Version", driver)
    yield _entry("CUDA Version", cuda)
    yield ""
    yield _entry("Attached GPUs", str(len(cards)))
    for card in cards:
        yield f"GPU {card.bus_id}"
        yield _entry("Product Name", card.card.name, 1)
        yield _entry("GPU UUID", card.uuid, 1)
        for title, values in (
            ("FB", (card.total_bytes, 0, card.used_bytes, card.free_bytes)),
            ("BAR1", None),
        ):
            yield f"    {title} Memory Usage"
            for name, value in zip(
                ("Total", "Reserved", "Used", "Free"),
                values or (None,) * 4,
                strict=True,
            ):
                if values or name != "Reserved":
                    text = "N/A" if value is None else f"{mib(value)} MiB"
                    yield _entry(name, text, 2)
    yield ""


def _entry(name: str, value: str, depth: int = 0) -> str:
    return f"{'    ' * depth + name:<42}: {value}"
