"""Gemma 2, 3 and 4 as llama.cpp stores them: one GGUF file, often quantised.

Metadata and tensors are translated to Hugging Face's names, and read as its
folders are (`hugging_face`), except for three changes that the converter of
llama.cpp makes to a Gemma:

  - norms of Gemma 2 and 3 carry the 1: what is stored is 1 + scale;
  - only part of the configuration is kept: the scale of queries and the RoPE
    base of local layers follow from the model's size, not from the file;
  - the tokenizer is a list of pieces, scores and types. `tokenizer` rebuilds
    the SentencePiece model from it. In pieces of spaces the converter spelt
    the space as ' '; it also marked pieces that can be typed, such as
    <start_of_turn>, as control pieces, which SentencePiece never finds in text.

What is particular to Gemma 4 is in `gguf_gemma4`.
"""

from __future__ import annotations

import collections
import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from gemma_scope import files
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model import (
  gguf_file,
  gguf_gemma4,
  hugging_face,
  hugging_face_tensors,
)

_TYPES = {
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  gguf_gemma4.ARCHITECTURE: 'gemma4_text',
}
# Metadata (after `gemma3.`) -> field of a config.json.
_FIELDS = {
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.sliding_window': 'sliding_window',
}
_OPTIONAL = {
  'attention.sliding_window_pattern': 'sliding_window_pattern',
  'rope.freq_base': 'rope_theta',
  'rope.freq_base_swa': 'rope_local_base_freq',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
# Metadata that must equal another one, or that changes no number.
_EQUAL = {
  'attention.value_length': 'attention.key_length',
  'rope.dimension_count': 'attention.key_length',
}
_FREE = (
  'context_length',
  'vocab_size',
  'rope.scaling.original_context_length',
  'rope.scaling.finetuned',
)
_SCALING = {'rope.scaling.type': 'rope_type', 'rope.scaling.factor': 'factor'}
_NAMES = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_TO_HUGGING_FACE = {
  **{ours: name for name, ours in _NAMES.items()},
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  **gguf_gemma4.NAMES,
}
_UNTIED = 'output.weight'
# SentencePiece's types of pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL = 'padding', 'eos', 'bos', 'unknown'  # those that text never spells


def config(name: str, path: pathlib.Path) -> lm.AnyConfig:
  """The shape that a file describes, checked against that of its name.

  Raises:
    ValueError: the file is damaged, describes no Gemma 2 to 4, or another one.
  """
  file = gguf_file.open_file(path)
  return hugging_face.config(name, _fields(file), str(path))


def _fields(file: gguf_file.File) -> dict[str, Any]:
  """The metadata in the words of a config.json."""
  path = str(file.path)
  architecture = file.metadata.get('general.architecture')
  if architecture not in _TYPES:
    raise gguf_file.BadFile(
      f'{path!r} holds a model of architecture {architecture!r}; expected '
      f'{" or ".join(map(repr, _TYPES))}.'
    )
  if file.metadata.get('split.count', 1) > 1:
    raise gguf_file.BadFile(
      f'{path!r} is one part of {file.metadata["split.count"]}: join them with '
      '`llama-gguf-split --merge` first.'
    )
  own_metadata = {
    key.removeprefix(f'{architecture}.'): value
    for key, value in file.metadata.items()
    if key.startswith(f'{architecture}.')
  }
  if architecture == gguf_gemma4.ARCHITECTURE:
    return gguf_gemma4.fields(file, own_metadata)
  gguf_file.check_metadata(
    file,
    own_metadata,
    needed=_FIELDS,
    known=(*_FIELDS, *_OPTIONAL, *_EQUAL, *_FREE, *_SCALING),
    equal=_EQUAL,
  )
  fields = {
    field: own_metadata[key]
    for key, field in {**_FIELDS, **_OPTIONAL}.items()
    if key in own_metadata
  }
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None:
    raise gguf_file.BadFile(f'{path!r} has no tensor token_embd.weight.')
  pattern = fields.get('sliding_window_pattern')
  if isinstance(pattern, np.ndarray):  # whether each layer is local
    kinds = np.where(pattern, 'sliding_attention', 'full_attention')
    fields['layer_types'] = kinds.tolist()
    del fields['sliding_window_pattern']
  fields |= {
    'model_type': _TYPES[architecture],
    'vocab_size': embedding.shape[0],
    'rms_norm_eps': float(f'{fields["rms_norm_eps"]:.6g}'),  # was float32
    'query_pre_attn_scalar': _query_scalar(fields),
  }
  scaling = {
    name: own_metadata[key]
    for key, name in _SCALING.items()
    if key in own_metadata
  }
  if scaling.get('rope_type', 'none') != 'none':
    fields['rope_scaling'] = scaling
  return fields


def _query_scalar(fields: Mapping[str, Any]) -> float:
  """By the model's size, as in llama.cpp: those of 27B scale by heads."""
  width, heads = fields['hidden_size'], fields['num_attention_heads']
  by_heads = any(
    getattr(size, 'query_scale_by_heads', False)  # Gemma 4 has no such scale
    and (size.d_model, size.num_heads) == (width, heads)
    for size in lm.SIZES.values()
  )
  return width / heads if by_heads else fields['head_dim']


def quantisation(path: pathlib.Path) -> str:
  """The file's name for its mixture, and the types of its matrices.

  Returns:
    Such as 'GGUF Q4_K_M (Q8_0, Q5_0, Q6_K, Q4_K)', most numbers first; '' for
    a file whose matrices are float32.
  """
  file = gguf_file.open_file(path)
  sizes = collections.Counter()
  for tensor in file.tensors.values():
    if len(tensor.shape) == 2:
      sizes[tensor.kind] += tensor.shape[0] * tensor.shape[1]
  kinds = [kind for kind, _ in sizes.most_common()]
  if kinds == ['F32']:
    return ''
  try:
    mixture = gguf_file.library().LlamaFileType(
      file.metadata.get('general.file_type')
    )
    name = mixture.name.removeprefix('MOSTLY_') + ' '
  except ValueError:
    name = ''
  return f'GGUF {name}({", ".join(kinds)})'


# ------------------------------------------------------------------ parameters


def read(
  path: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  needed: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
  """The parameters, dequantised one by one into their dtype and sharding.

  Args:
    path: of the file.
    shapes: of all parameters of the model, by their path with slashes.
    needed: those to read, with dtype and sharding.

  Raises:
    ValueError: a tensor is missing, unknown or of another shape; nothing was
      read.
  """
  file = gguf_file.open_file(path)
  _refuse_untied(file)
  is_4 = file.metadata['general.architecture'] == gguf_gemma4.ARCHITECTURE
  tensors = {
    _translated(name): _Norm(tensor) if 'norm' in name and not is_4 else tensor
    for name, tensor in file.tensors.items()
    if name not in (_UNTIED, gguf_gemma4.ROPE)
  }
  return hugging_face_tensors.assemble(str(path), tensors, shapes, needed)


def _translated(name: str) -> str:
  """'blk.3.attn_q.weight' -> 'layers.3.self_attn.q_proj.weight'."""
  match = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|scale)', name)
  if not match:
    return name  # refused as unknown
  block, module, kind = match.groups()
  table = gguf_gemma4.SCALES if kind == 'scale' else _TO_HUGGING_FACE
  if module not in table:
    return name
  without_suffix = kind == 'scale' or table[module] in gguf_gemma4.BARE
  layer = f'layers.{block}.' if block else ''
  return f'{layer}{table[module]}{"" if without_suffix else ".weight"}'


class _Norm:
  """A norm's scale: what is stored is its gain, 1 + scale."""

  def __init__(self, tensor: gguf_file.Tensor):
    self._tensor = tensor

  def get_shape(self) -> tuple[int, ...]:
    return self._tensor.shape

  def __getitem__(self, index) -> np.ndarray:
    return self._tensor[index] - np.float32(1)


def _refuse_untied(file: gguf_file.File) -> None:
  """A second embedding is a copy of the first, or no Gemma's."""
  first, second = map(file.tensors.get, ('token_embd.weight', _UNTIED))
  if second is None or first is None:
    return
  if first.kind != second.kind or not np.array_equal(first.data, second.data):
    raise gguf_file.BadFile(
      f"{str(file.path)!r} has {_UNTIED} that differs from the embedding's "
      'weights; this forward pass unembeds with the embedding, as Gemma does.'
    )


# ------------------------------------------------------------------- tokenizer


def tokenizer(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Writes the vocabulary as a SentencePiece model; its name has its hash.

  Args:
    path: of the GGUF file.
    folder: where the model is written, unless it is there.

  Raises:
    ValueError: the file has no vocabulary, or one of another kind.
  """
  model = _sentencepiece_model(gguf_file.open_file(path))
  digest = hashlib.sha256(model).hexdigest()
  target = folder / f'tokenizer-{digest[:16]}.model'
  if not target.is_file() or target.stat().st_size != len(model):
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(target, model)
  return target


def special_ids(path: pathlib.Path) -> dict[str, int]:
  """{'bos': id} where the file names it."""
  bos = gguf_file.open_file(path).metadata.get('tokenizer.ggml.bos_token_id')
  return {} if bos is None else {'bos': bos}


def _sentencepiece_model(file: gguf_file.File) -> bytes:
  from sentencepiece import sentencepiece_model_pb2

  fields = {
    key.removeprefix('tokenizer.ggml.'): value
    for key, value in file.metadata.items()
    if key.startswith('tokenizer.ggml.')
  }
  lists = [fields.get(key) for key in ('tokens', 'scores', 'token_type')]
  if fields.get('model') != 'llama' or any(values is None for values in lists):
    raise gguf_file.BadFile(
      f'{str(file.path)!r} has no SentencePiece vocabulary (its tokenizer is '
      f'{fields.get("model")!r}): set lm.tokenizer to the SentencePiece model '
      'that belongs to it.'
    )
  special = {role: fields.get(f'{role}_token_id', -1) for role in _SPECIAL}
  model = sentencepiece_model_pb2.ModelProto()
  for i, (piece, score, kind) in enumerate(zip(*lists, strict=True)):
    if i == special['unknown']:
      kind = _UNKNOWN
    elif kind == _CONTROL and i not in special.values():
      kind = _USER_DEFINED
    if kind == _USER_DEFINED:
      piece = piece.replace(' ', '▁')
    model.pieces.add(piece=piece, score=score, type=int(kind))
  trainer = model.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.vocab_size = len(lists[0])
  trainer.byte_fallback = True
  trainer.pad_id, trainer.eos_id = special['padding'], special['eos']
  trainer.bos_id, trainer.unk_id = special['bos'], special['unknown']
  for role, field in zip(
    _SPECIAL, ('pad_piece', 'eos_piece', 'bos_piece', 'unk_piece'), strict=True
  ):
    if special[role] >= 0:
      setattr(trainer, field, lists[0][special[role]])
  normalizer = model.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = bool(fields.get('add_space_prefix', False))
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return model.SerializeToString(deterministic=True)
