"""The tokenizer of a GGUF file as `tokenizer.json` and the files beside it."""

import dataclasses
import json
from typing import Any

import numpy as np

from sleep_jax.pretrained import chat, ends
from sleep_jax.pretrained.fields import PretrainedError, shown
from sleep_jax.pretrained.gguf_header import Header
from sleep_jax.pretrained.tokenizer import NAME

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # `token_type`
LONGEST = 1024  # characters of a token
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in tokenizers of the SentencePiece kind
# How `tokenizer.ggml.pre` says that a text is cut before bytes are joined: by a pattern, or None: as GPT-2
# does; and whether each digit stands alone before that.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[str, tuple[str | None, bool]] = {
  "gpt-2": (None, False),
  "smollm": (None, True),
  "llama-bpe": (_LLAMA3, False),
  "qwen2": (_LLAMA3.replace("{1,3}", ""), False),
}
# Special tokens that a file may name, by what `tokenizer_config.json` calls them.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("eos", "eot", "eom")  # tokens that end a text: of a turn, of a message


@dataclasses.dataclass(frozen=True)
class Made:
  """The tokenizer's files.

  Attributes:
    texts: file name -> text.
    ids: fields of `config.json` that name tokens.
  """

  texts: dict[str, str]
  ids: dict[str, int]


def make(header: Header) -> Made:
  """Makes them.

  Raises:
    PretrainedError: if there is no tokenizer, one of a kind that is not supported, or one that contradicts
      itself.
  """
  tokens = _texts(header, "tokens")
  if len(set(tokens)) < len(tokens):
    raise _error(header, "tokens", "has a token twice")
  if too_long := next((t for t in tokens if len(t) > LONGEST), None):
    raise _error(header, "tokens", f"has a token of {len(too_long)} characters, of at most {LONGEST}")
  kinds = _array(header, "token_type", len(tokens), np.integer)
  kinds = np.full(len(tokens), NORMAL) if kinds is None else kinds
  ids = {name: _id(header, name, len(tokens)) for name in dict.fromkeys((*SPECIAL.values(), *ENDS))}
  values = _tokenizer(header, tokens, kinds, ids["unknown"])
  values["added_tokens"] = [
    {
      "id": int(i), "content": tokens[i], "special": bool(kinds[i] != USER), "single_word": False,
      "lstrip": False, "rstrip": False, "normalized": False,
    }
    for i in np.flatnonzero(np.isin(kinds, (CONTROL, USER, UNKNOWN)))
  ]  # fmt: skip
  named = {name: tokens[i] for name, short in SPECIAL.items() if (i := ids[short]) is not None}
  ending = [i for name in ENDS if (i := ids[name]) is not None]
  texts = {
    NAME: json.dumps(values, ensure_ascii=False),
    chat.CONFIG: _json(
      {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | named
    ),
  }
  if ending:
    texts["generation_config.json"] = _json({ends.FIELD: list(dict.fromkeys(ending))})
  if (template := header.values.get(TEMPLATE)) is not None:
    if not isinstance(template, str) or len(template.encode()) > chat.LARGEST:
      raise header.error(f"{TEMPLATE} must be a text of at most {chat.LARGEST >> 20} MB")
    texts[chat.TEMPLATE] = template
  names = {"bos": "bos_token_id", "eos": ends.FIELD, "padding": "pad_token_id"}
  return Made(texts, {field: i for name, field in names.items() if (i := ids[name]) is not None})


def _tokenizer(header: Header, tokens: list[str], kinds: np.ndarray, unknown: int | None) -> dict[str, Any]:
  """`tokenizer.json` without its added tokens."""
  kind = header.values.get(f"{PREFIX}model")
  model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}}
  model |= {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
  values: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
  if kind == "gpt2":
    cut = header.values.get(f"{PREFIX}pre")
    if not isinstance(cut, str) or cut not in CUTS:
      raise _error(header, "pre", f"= {shown(cut)} is not supported; known: {', '.join(CUTS)}")
    pattern, digits = CUTS[cut]
    cutters = [{"type": "Digits", "individual_digits": True}] if digits else []
    if pattern is not None:
      split = {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
      cutters.append({"type": "Split", **split})
    spaced = _flag(header, "add_space_prefix", False)
    flags = {"add_prefix_space": spaced, "trim_offsets": True, "use_regex": pattern is None}
    cutters.append({"type": "ByteLevel", **flags})
    model |= {"merges": _merges(header, model["vocab"]), "unk_token": None, "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": cut == "llama-bpe"}
    values |= {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutters}}
    return values | {"model": model, "decoder": {"type": "ByteLevel", **flags}}
  if kind != "llama":
    raise _error(header, "model", f"= {shown(kind)} is not supported; known: gpt2, llama")
  scores = _array(header, "scores", len(tokens), np.floating)
  if scores is None or not np.all(np.isfinite(scores)):
    raise _error(header, "scores", "must have a finite number for each token")
  model |= {"merges": _by_score(tokens, kinds, scores), "fuse_unk": True, "byte_fallback": True}
  model |= {"unk_token": None if unknown is None else tokens[unknown], "ignore_merges": False}
  steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
  undo: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
  undo += [{"type": "ByteFallback"}, {"type": "Fuse"}]
  if _flag(header, "add_space_prefix", True):
    steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  values |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
  return values | {"model": model, "decoder": {"type": "Sequence", "decoders": undo}}


def _merges(header: Header, vocab: dict[str, int]) -> list[list[str]]:
  """Pairs of tokens that are joined, the first ones first."""
  merges = []
  for i, text in enumerate(_texts(header, "merges")):
    first, _, second = text.partition(" ")
    if not {first, second, first + second} <= vocab.keys():
      raise _error(header, f"merges[{i}]", f"= {shown(text)} does not join two tokens to a third")
    merges.append([first, second])
  return merges


def _by_score(tokens: list[str], kinds: np.ndarray, scores: np.ndarray) -> list[list[str]]:
  """`_merges` of the SentencePiece kind: what makes a token of a higher score comes first."""
  normal = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
  pairs = [
    (-float(scores[i]), normal[token[:at]], normal[token[at:]])
    for token, i in normal.items()
    for at in range(1, len(token))
    if token[:at] in normal and token[at:] in normal
  ]
  return [[tokens[first], tokens[second]] for _, first, second in sorted(pairs)]


def _texts(header: Header, name: str) -> list[str]:
  values = header.values.get(PREFIX + name)
  if not isinstance(values, list) or not values:
    raise _error(header, name, f"must be a list of texts, got {shown(values)}")
  return values


def _array(header: Header, name: str, length: int, kind: Any) -> np.ndarray | None:
  values = header.values.get(PREFIX + name)
  if values is None:
    return None
  if not isinstance(values, np.ndarray) or values.shape != (length,) or not np.issubdtype(values.dtype, kind):
    raise _error(header, name, f"must have a number for each of {length} tokens")
  return values


def _id(header: Header, name: str, count: int) -> int | None:
  """The number of a special token, None if the file names none."""
  value = header.values.get(f"{PREFIX}{name}_token_id")
  if value is not None and not (type(value) is int and 0 <= value < count):
    raise _error(header, f"{name}_token_id", f"must lie in 0..{count - 1}, got {shown(value)}")
  return value


def _flag(header: Header, name: str, default: bool) -> bool:
  value = header.values.get(PREFIX + name, default)
  if not isinstance(value, bool):
    raise _error(header, name, f"must be true or false, got {shown(value)}")
  return value


def _json(values: dict[str, Any]) -> str:
  return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _error(header: Header, name: str, problem: str) -> PretrainedError:
  return header.error(f"{PREFIX}{name} {problem}")
