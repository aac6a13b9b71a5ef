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
    """Yield the lines of the table that the program prints without an option.

    Args:
        cards: The cards to show.
        driver: The driver's version.
        cuda: The newest CUDA version that the driver supports.
        date: The time, in the format of ``ctime``.
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
        for line in _rows_of(card):
            yield _line(line, _COLUMNS)
        yield "+" + "+".join("-" * width for width in _COLUMNS) + "+"
    yield " " * _WIDTH
    if any(card.slices for card in cards):
        yield from _table_of_slices(cards)
        yield " " * _WIDTH
    yield _RULE
    yield f"|{' Processes:':<{_WIDTH}}|"
    yield f"|{_PROCESSES:<{_WIDTH}}|"
    yield f"|{'        ID   ID' + ' ' * 63 + 'Usage':<{_WIDTH}}|"
    yield "|" + "=" * _WIDTH + "|"
    rows = [(card.index, each) for card in cards for each in card.processes]
    for index, each in rows:
        instance = each.instance or ("N/A", "N/A")
        name = each.name
        if len(name) > _PROCESS_WIDTH:
            name = "..." + name[3 - _PROCESS_WIDTH :]
        ids = f"{instance[0]:>3}  {instance[1]:>3}"
        row = f" {index:>4}   {ids}  {each.pid:>14}      C   "
        held = mib(each.nbytes) + "MiB "
        yield f"|{row}{name:<{_PROCESS_WIDTH}}{held:>{_WIDTH - len(row) - _PROCESS_WIDTH}}|"
    if not rows:
        yield f"|{'  No running processes found':<{_WIDTH}}|"
    yield _RULE


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of a table, each cell cut or filled up to its column's width."""
    parts = (
        f"{text:<{width}.{width}}" for text, width in zip(cells, widths, strict=True)
    )
    return f"|{'|'.join(parts)}|"


def _rows_of(card: CardNow) -> tuple[tuple[str, str, str], ...]:
    """Return the three lines of a card, each of three columns."""
    name = card.name
    if len(name) > _NAME_WIDTH:
        name = name[: _NAME_WIDTH - 3] + "..."
    used = f"{mib(card.used_bytes)}MiB / {mib(card.total_bytes):>6}MiB".rjust(23)
    if card.card.is_integrated:
        used = " Not Supported"
    first = (
        f" {card.index:>3}  {name:<30} Off ",
        f"   {card.bus_id} Off ",
        f"{'On' if card.slices else 'N/A':>21} ",
    )
    busy = _IDLE
    if card.slices:
        busy = "     N/A      Default "
    if card.card.nvml_name:
        first = (f" {card.index:>3}  {name:<30} N/A ", _NO_BUS, first[2])
        busy = "     N/A          N/A "
    mode = card.mig_mode or "N/A"
    return (
        first,
        (" N/A   N/A   N/A             N/A /  N/A  ", f"{used} ", busy),
        (" " * 41, " " * 24, f"{mode:>21} "),
    )


def _table_of_slices(cards: Sequence[CardNow]) -> Iterator[str]:
    """Yield the lines of the table of slices (MIG).

    The engines that a slice shares (CE, ENC, …) and its BAR1 are not simulated.
    """
    yield _RULE
    yield f"|{' MIG devices:':<{_WIDTH}}|"
    rule = "+" + "+".join("-" * width for width in _SLICE_COLUMNS) + "+"
    yield rule
    yield from _SLICES_HEAD
    yield "|" + "+".join("=" * width for width in _SLICE_COLUMNS) + "|"
    for card in cards:
        for number, each in enumerate(card.slices):
            ids = f"{card.index:>3}  {each.instance[0]:>3} {each.instance[1]:>3} {number:>3}"
            total = mib(each.card.total_bytes)
            used = f"{mib(each.used_bytes):>16}MiB / {total:>5}MiB"
            sms = f" {each.card.multi_processor_count:<3}   N/A "
            for line in (
                (f"{ids}  ", f"{used}    ", sms, _NO_ENGINES),
                ("", f"{'N/A':>30}    ", "", ""),
            ):
                yield _line(line, _SLICE_COLUMNS)
            yield rule


#: Widths of the four columns of the table of slices.
_SLICE_COLUMNS: Final = (18, 34, 11, 23)
_SLICES_HEAD: Final = (
    "| GPU  GI  CI  MIG |                     Memory-Usage |        Vol|"
    "      Shared           |",
    "|      ID  ID  Dev |                       BAR1-Usage | SM     Unc|"
    " CE ENC DEC OFA JPG    |",
    "|                  |                                  |        ECC|"
    "                       |",
)
_NO_ENGINES: Final = " N/A"
_NO_BUS: Final = " N/A                N/A "
_IDLE: Final = "      0%      Default "
_PROCESSES: Final = (
    "  GPU   GI   CI              PID   Type   Process name"
    "                        GPU Memory "
)


def listing(cards: Sequence[CardNow]) -> Iterator[str]:
    """Yield the lines of ``-L``."""
    for card in cards:
        yield f"GPU {card.index}: {card.name} (UUID: {card.uuid})"
        for number, each in enumerate(card.slices):
            name = f"MIG {each.card.profile}"
            yield f"  {name:<15} Device {number:>2}: (UUID: {each.uuid})"


def log(
    cards: Sequence[CardNow], *, driver: str, cuda: str, date: str
) -> Iterator[str]:
    """Yield the lines of ``-q``: here only the card's name and its memory."""
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
        yield _entry("Product Name", card.name, 1)
        yield _entry("GPU UUID", card.uuid, 1)
        known = not card.card.is_integrated
        values = (card.total_bytes, 0, card.used_bytes, card.free_bytes)
        yield "    FB Memory Usage"
        for name, value in zip(
            ("Total", "Reserved", "Used", "Free"), values, strict=True
        ):
            yield _entry(name, f"{mib(value)} MiB" if known else "N/A", 2)
        yield "    BAR1 Memory Usage"
        for name in ("Total", "Used", "Free"):
            yield _entry(name, "N/A", 2)
    yield ""


def _entry(name: str, value: str, depth: int = 0) -> str:
    return f"{'    ' * depth + name:<42}: {value}"
