"""The command ``pytest-gpumem``: build checkpoints, replay allocator traces."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.errors import GpuMemError, TraceError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(arguments)
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
        help="build a model's checkpoint offline, seeded",
        description="Build a checkpoint of a model's real size without network.",
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
    checkpoint.add_argument("--seed", type=int, default=0, help="(default: 0)")
    checkpoint.add_argument(
        "--dtype", default="float32", help="dtype of the weights (default: float32)"
    )
    checkpoint.add_argument(
        "--weights",
        choices=("random", "zeros"),
        default="random",
        help="random, or zeros in sparse files that take no room (default: random)",
    )
    checkpoint.set_defaults(run=_checkpoint)

    replay = commands.add_parser(
        "replay",
        help="replay an allocator trace on the model of the caching allocator",
        description="Print {'rows': [...], 'oom': {...}} in the trace's own format.",
    )
    replay.add_argument("trace", type=Path, help="the trace, a JSON file")
    replay.set_defaults(run=_replay)
    return parser


def _checkpoint(options: argparse.Namespace) -> int:
    from pytest_gpumem.checkpoints import make_checkpoint  # noqa: PLC0415  # it is slow to import

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


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _replay(options: argparse.Namespace) -> int:
    from pytest_gpumem.model.replay import replay  # noqa: PLC0415  # only this command needs it

    try:
        trace = json.loads(options.trace.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{options.trace}: no JSON: {error}") from error
    json.dump(replay(trace).to_dict(), sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
