"""Compares one device's answers with another one's recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpumem.allocator.replay import replay

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Difference(NamedTuple):
    """A figure that differs from the recorded one.

    Attributes:
        where: The name of the figure.
        recorded: The recorded value.
        measured: The measured value, or the model's answer.
    """

    where: str
    recorded: Any
    measured: Any

    @property
    def error(self) -> float:
        """The relative error; infinite where the two are no numbers."""
        if not isinstance(self.recorded, int) or not isinstance(self.measured, int):
            return float("inf")
        return abs(self.measured - self.recorded) / max(self.recorded, 1)


def trace_differences(recorded: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what the allocator model answers differently to the recorded traces."""
    for trace in recorded["traces"]:
        meta = {"torch": recorded["versions"]["torch"], **trace["meta"]}
        answer = replay({**trace, "meta": meta})
        name = trace["meta"]["name"]
        for index, (want, have) in enumerate(
            zip(trace["rows"], answer.rows, strict=True)
        ):
            for field, recorded_value, measured in zip(
                trace["fields"], want, have, strict=True
            ):
                if recorded_value != measured:
                    yield Difference(
                        f"trace {name}, event {index}, {field}",
                        recorded_value,
                        measured,
                    )
        for index in sorted({*trace["oom"], *answer.oom}, key=int):
            want_text, have_text = trace["oom"].get(index), answer.oom.get(index)
            if want_text != have_text:
                yield Difference(f"trace {name}, OOM {index}", want_text, have_text)


def phase_differences(
    recorded: Mapping[str, Any], measured: Mapping[str, Any]
) -> Iterator[Difference]:
    """Yield the figures of a model's phases that two recordings do not share."""
    if len(recorded["phases"]) != len(measured["phases"]):
        yield Difference("plans", len(recorded["phases"]), len(measured["phases"]))
    for want, have in zip(recorded["phases"], measured["phases"], strict=False):
        plan = " ".join(want["plan"].values())
        if want["plan"] != have["plan"] or want.get("oom") != have.get("oom"):
            yield Difference(f"{plan}, outcome", want.get("oom"), have.get("oom"))
        for phase, figures in want["phases"].items():
            for name, value in figures.items():
                other = have["phases"].get(phase, {}).get(name)
                if value != other:
                    yield Difference(f"{plan}, {phase}, {name}", value, other)


def differences(
    recorded: Mapping[str, Any], measured: Mapping[str, Any]
) -> list[Difference]:
    """Return the differences between a device's answers and a recording.

    Args:
        recorded: From a real card.
        measured: From the simulated device with the same card.
    """
    found = [*trace_differences(recorded), *phase_differences(recorded, measured)]
    found += [
        Difference(
            f"workspace of {name}", nbytes, measured["workspace_bytes"].get(name)
        )
        for name, nbytes in recorded["workspace_bytes"].items()
        if nbytes != measured["workspace_bytes"].get(name)
    ]
    found += [
        Difference(f"OOM text: {name}", text, measured["oom_texts"].get(name))
        for name, text in recorded["oom_texts"].items()
        if text != measured["oom_texts"].get(name)
    ]
    return found
