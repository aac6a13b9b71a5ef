"""The same models in other uses: words one by one with a cache, and ways of training.

``cases_of_models.py`` has the architectures.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from cases_of_models import TOKENS, build, groups, mark_of, use_of, without_values
from recorded_requests import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

__all__ = ["CARDS", "VALUES", "cases", "groups"]

VALUES: Final = "none"
CARDS: Final = (("8.0", 108),)
#: Words that are made one by one.
_NEW: Final = 4
_ALONE: Final = "SequenceClassification"


def cases(group: str) -> Iterator[Case]:
    """Yield uses by way of attention and type."""
    runs: dict[str, Any] = {
        "SGD sdpa float32": partial(_train, group, kind="SGD", momentum=0.9),
        "checkpoints sdpa float32": partial(_train, group, recomputes=True),
        "checkpoints sdpa bfloat16": partial(
            _train, group, recomputes=True, dtype=torch.bfloat16
        ),
        "autocast sdpa float32": partial(_train, group, casts=True),
        "autocast eager float32": partial(_train, group, casts=True, attention="eager"),
        "fused sdpa bfloat16": partial(_train, group, dtype=torch.bfloat16, fused=True),
    }
    if use_of(group) != _ALONE:
        for attention in ("eager", "sdpa"):
            for name in ("float32", "bfloat16"):
                runs[f"words {attention} {name}"] = partial(
                    _words, group, attention, getattr(torch, name)
                )
    for words, run in runs.items():
        yield Case(words, mark_of(group, words), run)


def _words(group: str, attention: str, dtype: torch.dtype, notes: Notes) -> None:
    """Make words one by one; keys and values of those before lie in a cache.

    The words are said, as which one is likeliest is a value.
    """
    with without_values():
        model = build(group, attention, dtype).eval()
        given = torch.ones(TOKENS, dtype=torch.long).cuda()
        word = torch.ones(TOKENS[0], 1, dtype=torch.long).cuda()
        known: dict[str, Any] = {}
        with torch.no_grad():
            if use_of(group) == "Seq2SeqLM":
                with notes.phase("read"):
                    known["encoder_outputs"] = model.get_encoder()(given)
                given = word
            name = "input_ids" if not known else "decoder_input_ids"
            for number in range(_NEW):
                with notes.phase(f"word {number}"):
                    made = model(**{name: given}, **known, use_cache=True)
                    known["past_key_values"] = made.past_key_values
                    del made
                given = word
            with notes.phase("forgotten"):
                known.clear()


def _train(  # ways of training
    group: str,
    notes: Notes,
    *,
    kind: str = "AdamW",
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    recomputes: bool = False,
    casts: bool = False,
    **options: Any,
) -> None:
    """Make two steps."""
    with without_values():
        model = build(group, attention, dtype).train()
        if recomputes:
            model.gradient_checkpointing_enable()
        tokens = torch.ones(TOKENS, dtype=torch.long).cuda()
        given: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
        if hasattr(model.config, "use_cache"):
            given["use_cache"] = False
        if use_of(group) == _ALONE:
            given["labels"] = torch.ones(TOKENS[0], dtype=torch.long).cuda()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **options)
        for step in (1, 2):
            cast = torch.autocast("cuda", torch.bfloat16, enabled=casts)
            with notes.phase(f"forward {step}"), cast:
                loss = model(**given).loss
            with notes.phase(f"backward {step}"):
                loss.backward()
            with notes.phase(f"step {step}"):
                optimizer.step()
            with notes.phase(f"zeroed {step}"):
                optimizer.zero_grad()
                del loss
