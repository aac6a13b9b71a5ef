"""The command ``pytest-gpumem``: build checkpoints, replay allocator traces."""

from __future__ import annotations

import argparse
import io
import json
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.commands.check_command import add_check
from pytest_gpumem.commands.reports import add_commands
from pytest_gpumem.errors import (
    DeviceUnavailableError,
    GpuMemError,
    RecordingError,
    TraceError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names in files may contain characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int = options.run(options)
    except (GpuMemError, OSError) as error:
        sys.stderr.write(f"pytest-gpumem: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("pytest-gpumem: interrupted\n")
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pytest-gpumem", description="Test GPU out-of-memory robustness."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    checkpoint = commands.add_parser(
        "checkpoint",
        help="build a model's checkpoint without network",
        description="It has the model's real size, and random weights from a seed.",
    )
    checkpoint.add_argument(
        "model",
        help="a known name (bert-large, bert-base, ...) or a config.json of transformers",
    )
    checkpoint.add_argument(
        "--out", type=Path, help="folder to write (default: the user's cache)"
    )
    checkpoint.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="file format (default: safetensors; bin is the legacy pytorch_model.bin)",
    )
    checkpoint.add_argument(
        "--max-shard-size", help="split the weights into files of at most this size"
    )
    checkpoint.add_argument(
        "--seed", type=int, default=0, help="seed of the weights (default: 0)"
    )
    checkpoint.add_argument(
        "--dtype", default="float32", help="dtype of the weights (default: float32)"
    )
    checkpoint.add_argument(
        "--weights",
        choices=("random", "zeros"),
        default="random",
        help="random, or zeros in sparse files, which take almost no disk space (default: "
        "random)",
    )
    checkpoint.set_defaults(run=_checkpoint)

    record = commands.add_parser(
        "record",
        help="record the answers of this machine's card and of PyTorch's allocator on it",
        description="Play allocator traces and a model's phases on the CUDA card, and "
        "write the measured figures, with card, driver and versions.",
    )
    record.add_argument(
        "--out", type=Path, required=True, help="the JSON file to write"
    )
    record.add_argument(
        "--checkpoint",
        default="bert-large",
        help="the model: a folder, or a known name of a BERT; with 'none' no model is run "
        "(default: bert-large)",
    )
    record.add_argument(
        "--simulate",
        metavar="CARD",
        help="record this simulated card instead of a real one",
    )
    record.set_defaults(run=_record)

    replay = commands.add_parser(
        "replay",
        help="replay an allocator trace on the model of the caching allocator",
        description="Print {'rows': [...], 'oom': {...}} in the trace's own format.",
    )
    replay.add_argument("trace", type=Path, help="the trace, a JSON file")
    replay.set_defaults(run=_replay)

    add_check(commands)
    _add_fit(commands)

    doctor = commands.add_parser(
        "doctor",
        help="show what this machine has, and what the plugin would do on it",
        description="Exit with 1 if tests could not run here, else with 0.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    add_commands(commands)
    return parser


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="show on which cards a model fits, and what takes the memory",
        description="Try a task of a model on simulated cards, without values: models "
        "may be larger than this machine. Exit with 1 if a card is too small.",
    )
    fit.add_argument(
        "model",
        help="a known name (bert-large, ...), a config.json of transformers, or a folder "
        "with one",
    )
    fit.add_argument(
        "--task",
        default="forward",
        metavar="TASK",
        help="load, forward, generate or train (default: forward)",
    )
    fit.add_argument(
        "--cards",
        metavar="NAMES",
        help="cards to try, separated by commas (default: a few common ones)",
    )
    fit.add_argument(
        "--batch", type=int, default=1, help="rows of the batch (default: 1)"
    )
    fit.add_argument(
        "--seq", type=int, default=128, help="tokens in each row (default: 128)"
    )
    fit.add_argument(
        "--new-tokens", type=int, default=32, help="tokens to generate (default: 32)"
    )
    fit.add_argument(
        "--dtype",
        default="float32",
        help="float32, bfloat16 or float16 (default: float32)",
    )
    fit.add_argument(
        "--optimizer",
        default="adamw",
        help="adamw, adamw-fused, sgd or sgd-momentum (default: adamw)",
    )
    fit.add_argument(
        "--checkpointing", action="store_true", help="train with gradient checkpointing"
    )
    fit.add_argument(
        "--attention", default="sdpa", help="sdpa or eager (default: sdpa)"
    )
    fit.add_argument("--architecture", help="the model's class (default: its config's)")
    fit.add_argument(
        "--no-largest-batch",
        action="store_true",
        help="do not search for the largest batch; the search takes several runs a card",
    )
    fit.add_argument("--json", action="store_true", help="print JSON; sizes are bytes")
    fit.set_defaults(run=_fit)


def _fit(options: argparse.Namespace) -> int:
    from pytest_gpumem.planning.fit import DEFAULT_CARDS, fit_model
    from pytest_gpumem.planning.table import fit_table
    from pytest_gpumem.planning.task import FitTask

    report = fit_model(
        options.model,
        FitTask(
            options.task,
            batch=options.batch,
            seq=options.seq,
            new_tokens=options.new_tokens,
            dtype=options.dtype,
            optimizer=options.optimizer,
            checkpointing=options.checkpointing,
            attention=options.attention,
        ),
        cards=options.cards or DEFAULT_CARDS,
        largest_batch=not options.no_largest_batch,
        architecture=options.architecture,
        progress=_say,
    )
    text = (
        json.dumps(report.to_json(), indent=1)
        if options.json
        else "\n".join(fit_table(report))
    )
    sys.stdout.write(f"{text}\n")
    return 0 if all(each.fits for each in report.cards) else 1


def _doctor(options: argparse.Namespace) -> int:
    from pytest_gpumem import doctor

    return doctor.print_findings(as_json=options.json)


def _checkpoint(options: argparse.Namespace) -> int:
    from pytest_gpumem.checkpoints import make_checkpoint

    path = make_checkpoint(
        options.model,
        out=options.out,
        format=options.format,
        max_shard_size=options.max_shard_size,
        seed=options.seed,
        dtype=options.dtype,
        weights=options.weights,
        progress=_say,
    )
    sys.stdout.write(f"{path}\n")
    return 0


def _record(options: argparse.Namespace) -> int:
    from pytest_gpumem.recording import record, save

    if find_spec("torch") is None:
        raise DeviceUnavailableError(
            "record needs torch; install it: pip install torch"
        )
    if not options.out.parent.is_dir():
        raise RecordingError(
            f"--out: {options.out.parent} is not a folder; make it, or choose another"
        )
    checkpoint = None
    if options.checkpoint != "none":
        from pytest_gpumem.checkpoints import resolve_checkpoint

        checkpoint = resolve_checkpoint(options.checkpoint, progress=_say)
    with _device(options.simulate):
        recorded = record(checkpoint, progress=_say)
    save(recorded, options.out)
    sys.stdout.write(f"{options.out}\n")
    return 0


def _device(card: str | None) -> AbstractContextManager[object]:
    """Return a block in which "cuda" means the card to record.

    Raises:
        DeviceUnavailableError: There is no real card, and no card to simulate is named.
    """
    if card is not None:
        from pytest_gpumem.devices.simulated.install import simulated_device

        return simulated_device(card)
    import torch

    if not torch.cuda.is_available():
        raise DeviceUnavailableError(
            "record needs a CUDA card, and torch finds none; run it on a machine with a "
            "card, or record a simulated card with --simulate CARD"
        )
    return nullcontext()


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _replay(options: argparse.Namespace) -> int:
    from pytest_gpumem.allocator.replay import replay

    try:
        trace = json.loads(options.trace.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{options.trace} is not JSON: {error}") from error
    json.dump(replay(trace).to_dict(), sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
