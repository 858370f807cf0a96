"""Small GGUF files, written from the format's description and not by the code under test."""

import pathlib
import struct
from typing import Any

import numpy as np
import tokenizers

from tests.pretrained import tiny

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
KINDS = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "I32": 26, "BF16": 30}
WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 64, 4, 2, 96, 2
NORMAL, CONTROL = 1, 3


def text(x: str) -> bytes:
  data = x.encode()
  return struct.pack("<Q", len(data)) + data


def value(x: Any) -> bytes:
  """A field's kind and value; numbers are u32 or f32 unless given as (kind, number)."""
  if isinstance(x, bool):
    return struct.pack("<I?", BOOL, x)
  if isinstance(x, int):
    return struct.pack("<II", U32, x)
  if isinstance(x, float):
    return struct.pack("<If", F32, x)
  if isinstance(x, str):
    return struct.pack("<I", STRING) + text(x)
  if isinstance(x, np.ndarray):
    kind = {"int32": I32, "float32": F32, "uint32": U32}[x.dtype.name]
    return struct.pack("<IIQ", ARRAY, kind, len(x)) + x.tobytes()
  return struct.pack("<IIQ", ARRAY, STRING, len(x)) + b"".join(map(text, x))


def write(
  path: pathlib.Path, fields: dict[str, Any], tensors: dict[str, tuple[str, np.ndarray]]
) -> pathlib.Path:
  """One file; each tensor with its kind."""
  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
  head += b"".join(text(name) + value(x) for name, x in fields.items())
  data = b""
  for name, (kind, x) in tensors.items():
    shape = struct.pack(f"<{x.ndim}Q", *x.shape[::-1])
    head += text(name) + struct.pack("<I", x.ndim) + shape + struct.pack("<IQ", KINDS[kind], len(data))
    data += stored(kind, x)
    data += b"\0" * (-len(data) % 32)
  path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
  return path


def stored(kind: str, x: np.ndarray) -> bytes:
  if kind == "F32":
    return x.astype("<f4").tobytes()
  if kind == "F16":
    return x.astype("<f2").tobytes()
  if kind == "BF16":
    return (np.ascontiguousarray(x, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
  blocks = x.astype("<f4").reshape(-1, 32)
  out = b""
  for scale, low, codes in zip(*quantised(kind, blocks), strict=True):
    if kind == "Q8_0":  # scale, 32 signed bytes
      out += scale.tobytes() + codes.astype(np.int8).tobytes()
    else:  # scale, lowest, the first 16 in the low halves of bytes, the others in the high ones
      out += scale.tobytes() + low.tobytes() + (codes[:16] | codes[16:] << 4).astype(np.uint8).tobytes()
  return out


def quantised(kind: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Scales and lowest values [n] in half precision, codes [n, 32]."""
  if kind == "Q8_0":
    scale, low = np.abs(blocks).max(1) / 127, np.zeros(len(blocks))
  else:
    low = blocks.min(1)
    scale = (blocks.max(1) - low) / 15
  scale, low = scale.astype("<f2"), low.astype("<f2")
  codes = np.rint((blocks - low[:, None].astype("<f4")) / np.maximum(scale[:, None].astype("<f4"), 1e-9))
  most = (-127, 127) if kind == "Q8_0" else (0, 15)
  return scale, low, np.clip(codes, *most).astype(int)


def read_back(kind: str, x: np.ndarray) -> np.ndarray:
  """What a tensor of a kind holds once it is stored, float32."""
  if kind == "F32":
    return x.astype("<f4")
  if kind == "F16":
    return x.astype("<f2").astype("<f4")
  if kind == "BF16":
    return (np.ascontiguousarray(x, "<f4").view("<u4") >> 16 << 16).view("<f4").reshape(x.shape)
  scale, low, codes = quantised(kind, x.astype("<f4").reshape(-1, 32))
  return (scale[:, None].astype("<f4") * codes + low[:, None].astype("<f4")).astype("<f4").reshape(x.shape)


def paired(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k as these files have them: row i of a head's first half, then row i of its second."""
  width = x.shape[0] // heads
  order = [
    h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in (0, 1)
  ]
  return x[order]


def published(rng: np.random.Generator, *, tied: bool, bias: bool = False) -> dict[str, np.ndarray]:
  """Random tensors of a small Llama under their published names."""
  head = WIDTH // HEADS

  def matrix(out: int, into: int) -> np.ndarray:
    return (rng.normal(size=(out, into)) / np.sqrt(into)).astype("<f4")

  tensors = {"model.embed_tokens.weight": matrix(tiny.VOCAB, WIDTH), "model.norm.weight": vector(rng, WIDTH)}
  if not tied:
    tensors["lm_head.weight"] = matrix(tiny.VOCAB, WIDTH)
  for i in range(LAYERS):
    at = f"model.layers.{i}."
    for name, out, into in (
      ("self_attn.q_proj", WIDTH, WIDTH), ("self_attn.k_proj", KV_HEADS * head, WIDTH),
      ("self_attn.v_proj", KV_HEADS * head, WIDTH), ("self_attn.o_proj", WIDTH, WIDTH),
      ("mlp.gate_proj", HIDDEN, WIDTH), ("mlp.up_proj", HIDDEN, WIDTH), ("mlp.down_proj", WIDTH, HIDDEN),
    ):  # fmt: skip
      tensors[f"{at}{name}.weight"] = matrix(out, into)
      if bias:
        tensors[f"{at}{name}.bias"] = vector(rng, out)
    tensors[f"{at}input_layernorm.weight"] = vector(rng, WIDTH)
    tensors[f"{at}post_attention_layernorm.weight"] = vector(rng, WIDTH)
  return tensors


def vector(rng: np.random.Generator, size: int) -> np.ndarray:
  return (1 + 0.1 * rng.normal(size=size)).astype("<f4")


NAMES = {
  "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def as_stored(tensors: dict[str, np.ndarray], kind: str) -> dict[str, tuple[str, np.ndarray]]:
  """The same under the names of these files: matrices of a kind, vectors in float32."""
  found = {}
  for name, x in tensors.items():
    *at, ending = name.removeprefix("model.").split(".")
    part = NAMES.get(".".join(at[2:])) if at[0] == "layers" else OUTSIDE[at[0]]
    if part in ("attn_q", "attn_k"):
      x = paired(x, HEADS if part == "attn_q" else KV_HEADS)
    new = f"blk.{at[1]}.{part}.{ending}" if at[0] == "layers" else f"{part}.{ending}"
    found[new] = ("F32" if x.ndim == 1 else kind, x)
  return found


def fields(folder: pathlib.Path) -> dict[str, Any]:
  """Metadata of that model, with a byte-level tokenizer trained here (a digit is a token of its own)."""
  made = tokenizer(folder)
  vocab = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
  special = {token["id"] for token in made["added_tokens"]}
  return {
    "general.architecture": "llama",
    "general.name": "small",
    "llama.block_count": LAYERS,
    "llama.context_length": 256,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50_000.0,
    "llama.rope.dimension_count": WIDTH // HEADS,
    "llama.vocab_size": tiny.VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": vocab,
    "tokenizer.ggml.token_type": np.array(
      [CONTROL if i in special else NORMAL for i in range(len(vocab))], np.int32
    ),
    "tokenizer.ggml.merges": [" ".join(pair) for pair in made["model"]["merges"]],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
  }


def tokenizer(folder: pathlib.Path) -> dict[str, Any]:
  """`tokenizer.json` of a tokenizer of SmolLM's kind; it lies in the folder, too."""
  import json

  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=tiny.VOCAB,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  words = (
    "the window is read, and what it says is kept; then it is forgotten. 12 words, 345 letters: who knows? "
  )
  made.train_from_iterator([words * 3, words.title(), words.upper(), "Größe naïve café " * 9], trainer)
  (folder / "expected_tokenizer.json").write_text(made.to_str())
  return json.loads(made.to_str())


def model(folder: pathlib.Path, kind: str = "F32", *, tied: bool = True, bias: bool = False, **changes: Any):
  """A file of a small random model: (path, published tensors). `changes`: of fields; None removes one."""
  tensors = published(np.random.default_rng(0), tied=tied, bias=bias)
  values = {n: x for n, x in (fields(folder) | changes).items() if x is not None}
  return write(folder / "small.gguf", values, as_stored(tensors, kind)), tensors
