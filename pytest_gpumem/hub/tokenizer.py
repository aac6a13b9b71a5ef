"""Makes tokenizers with the number of tokens that a config gives, for any text.

Note [Made-up vocabularies]
The pieces are letters, pairs and triples of letters, the frequent ones first. So an
English word becomes about two tokens; with a published vocabulary it becomes about one
and a half. The rest of the vocabulary is filled with tokens that no text contains. No
list of words is read and nothing is trained, so the same config gives the same files.
"""

from __future__ import annotations

import json
from itertools import chain, islice, product
from typing import TYPE_CHECKING, Any, Final

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

#: Letters of English text, the frequent ones first.
_LETTERS: Final = "etaoinshrdlcumwfgypbvkjxqz"
#: Models whose tokenizer is BERT's.
#: Source: ``TOKENIZER_MAPPING_NAMES`` in transformers' ``tokenization_auto.py``.
_LIKE_BERT: Final = frozenset(
    (
        "bert",
        "bros",
        "convbert",
        "distilbert",
        "electra",
        "ernie",
        "layoutlm",
        "megatron-bert",
        "nomic_bert",
        "squeezebert",
        "visual_bert",
    )
)
#: Ids of special tokens in BERT's vocabularies; smaller vocabularies begin with them.
_BERT_SPECIAL: Final = {
    "[PAD]": 0,
    "[UNK]": 100,
    "[CLS]": 101,
    "[SEP]": 102,
    "[MASK]": 103,
}
#: Models that put special tokens around a text as RoBERTa does.
_LIKE_ROBERTA: Final = frozenset(("roberta", "xlm-roberta", "camembert"))
#: The fewest tokens of a tokenizer.
_FEWEST: Final = 8
#: Bytes that byte-level tokenizers write as the character that they are.
#: Source: ``bytes_to_unicode`` in OpenAI's GPT-2, ``encoder.py``.
_PLAIN_BYTES: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
#: The token at the end of a text of GPT-2 or Qwen.
_END: Final = "<|endoftext|>"
#: The character for a space in a byte-level tokenizer.
_SPACE: Final = "\u0120"


def write_tokenizer(folder: Path, config: Mapping[str, Any], *, name: str) -> bool:
    """Write a tokenizer for a model into a folder; return whether the model has one.

    Args:
        folder: The folder.
        config: The contents of the model's ``config.json``.
        name: The model's name. If it contains ``-cased`` and the tokenizer is like
            BERT's, the tokenizer distinguishes capital letters.

    Raises:
        OSError: The files cannot be written.
    """
    size = config.get("vocab_size")
    kind = str(config.get("model_type"))
    if not isinstance(size, int) or size < _FEWEST:
        inner = config.get("text_config")
        if isinstance(inner, dict):
            return write_tokenizer(folder, inner, name=name)
        return False
    files = (
        _word_pieces(size, is_cased="-cased" in name)
        if kind in _LIKE_BERT
        else _byte_pairs(size, kind, config)
    )
    longest = _longest(config)
    if longest is not None:
        files["tokenizer_config.json"]["model_max_length"] = longest
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file).write_text(text, encoding="utf-8")
    return True


def _longest(config: Mapping[str, Any]) -> int | None:
    """Return the longest text of a model, in tokens; None if its config does not say."""
    for key in ("max_position_embeddings", "n_positions"):
        count = config.get(key)
        if isinstance(count, int) and count > 0:
            if config.get("model_type") in _LIKE_ROBERTA:
                # Positions begin after that of the padding. Source: RobertaEmbeddings,
                # ``create_position_ids_from_input_ids``.
                return count - int(config.get("pad_token_id") or 0) - 1
            return count
    return None


# -- like BERT ----------------------------------------------------------------------------


def _word_pieces(size: int, *, is_cased: bool) -> dict[str, Any]:
    special = _BERT_SPECIAL
    if size < 2 * max(special.values()):
        special = {token: index for index, token in enumerate(special)}
    vocabulary = _number(size, special, _pieces(is_cased=is_cased), "[unused{}]")
    tokenizer = _tokenizer(special, models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106  # no password, but a token of the vocabulary
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not is_cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = _template(
        "[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special
    )
    tokenizer.decoder = decoders.WordPiece()
    return {
        "vocab.txt": "".join(f"{token}\n" for token in vocabulary),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": not is_cased,
            **{f"{each.strip('[]').lower()}_token": each for each in special},
        },
    }


def _pieces(*, is_cased: bool) -> Iterator[str]:
    """Yield pieces of words, each as a word's beginning and as its continuation."""
    others = [chr(code) for code in range(33, 127) if chr(code) not in _LETTERS]
    capitals = _LETTERS.upper()
    others.sort(key=lambda each: (each in capitals) != is_cased)
    beginnings = chain(_LETTERS, others, _groups(2), _groups(3))
    return chain.from_iterable((each, f"##{each}") for each in beginnings)


# -- byte-level, like GPT-2 ---------------------------------------------------------------


def _byte_pairs(size: int, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    special = _special_tokens(size, kind, config)
    alphabet = [
        *_LETTERS,
        *(each for each in _byte_characters() if each not in _LETTERS),
    ]
    is_complete = size >= len(alphabet) + len(special)
    if not is_complete:  # a byte without a token of its own becomes the unknown token
        alphabet = [_SPACE, *(each for each in alphabet if each != _SPACE)]
        if "<unk>" not in special:
            free = next(each for each in range(size) if each not in special.values())
            special["<unk>"] = free
    room = size - len(special) - len(alphabet)
    merges = list(islice(_merges(), max(room, 0)))
    tokens = chain(alphabet, (left + right for left, right in merges))
    vocabulary = _number(size, special, tokens, "<unused{}>")
    unknown = "<unk>" if "<unk>" in special else None
    named = {
        f"{role}_token": token
        for role, token in _roles(kind, config, special).items()
        if token in special
    }
    model = models.BPE(vocabulary, merges, unk_token=unknown)
    tokenizer = _tokenizer(special, model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = _ends(kind, special, named)
    tokenizer.decoder = decoders.ByteLevel()
    return {
        "vocab.json": vocabulary,
        "merges.txt": "\n".join(
            ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
        ),
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": {
            "tokenizer_class": {"gpt2": "GPT2Tokenizer"}.get(
                kind, "PreTrainedTokenizerFast"
            ),
            **named,
        },
    }


def _special_tokens(size: int, kind: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the special tokens, with their ids in the config."""
    special: dict[str, int] = {}
    ends = _END if _is_like_gpt2(kind) else "</s>"
    for role, token in (
        ("eos", ends),
        ("bos", "<s>"),
        ("pad", "<pad>"),
        ("mask", "<mask>"),
    ):
        index = config.get(f"{role}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if role == "mask" and index is None and kind in _LIKE_ROBERTA:
            index = size - 1
        if (
            isinstance(index, int)
            and 0 <= index < size
            and index not in special.values()
        ):
            special[token] = index
    if kind in _LIKE_ROBERTA and 3 not in special.values():  # noqa: PLR2004  # the id in the published vocabulary
        special["<unk>"] = 3
    if not special:
        special[ends] = 0
    return special


def _roles(
    kind: str, config: Mapping[str, Any], special: Mapping[str, int]
) -> dict[str, str]:
    """Return the token of each role; one token may have several roles."""
    by_index = {index: token for token, index in special.items()}
    roles = {"unk": "<unk>", "mask": "<mask>"}
    if _is_like_gpt2(kind):  # the default of their classes for these roles
        roles = dict.fromkeys(("eos", "unk", "pad")[: 2 if kind == "gpt2" else 3], _END)
    for role in ("eos", "bos", "pad"):
        index = config.get(f"{role}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and index in by_index:
            roles[role] = by_index[index]
    if kind in _LIKE_ROBERTA:
        roles |= {"cls": roles.get("bos", ""), "sep": roles.get("eos", "")}
    return roles


def _is_like_gpt2(kind: str) -> bool:
    return kind == "gpt2" or kind.startswith("qwen")


def _ends(kind: str, special: Mapping[str, int], named: Mapping[str, str]) -> Any:
    """Return the processor that adds tokens around a text, as in published tokenizers."""
    first, last = named.get("bos_token"), named.get("eos_token")
    if kind in _LIKE_ROBERTA and first and last:
        single = f"{first}:0 $A:0 {last}:0"
        return _template(single, f"{single} {last}:0 $B:0 {last}:0", special)
    if kind in ("t5", "mt5", "umt5") and last:
        return _template(f"$A:0 {last}:0", f"$A:0 {last}:0 $B:0 {last}:0", special)
    if first and first != last:
        return _template(f"{first}:0 $A:0", f"{first}:0 $A:0 {first}:1 $B:1", special)
    return processors.ByteLevel(trim_offsets=False)


def _byte_characters() -> list[str]:
    """Return the character that represents each byte."""
    spare = (chr(256 + count) for count in range(256))
    return [chr(each) if each in _PLAIN_BYTES else next(spare) for each in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    """Yield the parts of which pieces of words are made, the short ones first."""
    yield from ((_SPACE, letter) for letter in _LETTERS)
    for group in _groups(2):
        yield group[0], group[1]
        yield _SPACE + group[0], group[1]
    for group in _groups(3):
        yield group[:2], group[2]
        yield _SPACE + group[:2], group[2]


# -- both ---------------------------------------------------------------------------------


def _groups(length: int) -> Iterator[str]:
    """Yield all groups of a number of letters, those of frequent letters first."""
    ranks = product(range(len(_LETTERS)), repeat=length)
    for group in sorted(ranks, key=lambda each: (sum(each), each)):
        yield "".join(_LETTERS[rank] for rank in group)


def _number(
    size: int, special: Mapping[str, int], tokens: Iterable[str], filler: str
) -> dict[str, int]:
    """Return a number of tokens with their ids, in order of the ids."""
    taken = {index: token for token, index in special.items()}
    seen = set(special)
    fresh = (each for each in tokens if each not in seen)
    vocabulary: dict[str, int] = {}
    # BERT's vocabularies have their first hundred numbers unused.
    start = 100 if special.get("[UNK]") == 100 else 0  # noqa: PLR2004  # see _BERT_SPECIAL
    unused = 0
    for index in range(size):
        token = taken.get(index)
        if token is None:
            token = next(fresh, None) if index >= start else None
        if token is None:
            token = filler.format(unused)
            unused += 1
        vocabulary[token] = index
    return vocabulary


def _tokenizer(special: Mapping[str, int], model: Any) -> Tokenizer:
    """Return a tokenizer with its special tokens."""
    tokenizer = Tokenizer(model)
    # As in the published tokenizers, only a mask includes the blank before it.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, lstrip=token == "<mask>", normalized=False, special=True)  # noqa: S105  # no password, but a token of the vocabulary
            for token in sorted(special, key=special.__getitem__)
        ]
    )
    return tokenizer


def _template(single: str, pair: str, tokens: Mapping[str, int]) -> Any:
    """Return the processor that puts special tokens around one or two texts."""
    return processors.TemplateProcessing(single, pair, [*tokens.items()])
