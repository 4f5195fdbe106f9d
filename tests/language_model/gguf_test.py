"""Gemma from GGUF files, held to Hugging Face's folders of the same weights.

The files are written here, by the `gguf` package, as llama.cpp's converter
writes them.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file
from safetensors.numpy import save_file

from gemma_scope import mesh as mesh_lib
from gemma_scope.language_model import gguf_file, packages, weights
from gemma_scope.text import tokenizers

gguf = pytest.importorskip('gguf', reason='gguf is not installed')

FIXTURES = pathlib.Path(__file__).parent / 'gemma_fixtures'
NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
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


def _is_dequantised(kind) -> bool:
  try:
    size = gguf.GGML_QUANT_SIZES[kind][1]
    gguf.dequantize(np.zeros((1, size), np.uint8), kind)
  except (NotImplementedError, KeyError):
    return False
  return True


KINDS = [k.name for k in gguf.GGMLQuantizationType if _is_dequantised(k)]


def named(name: str) -> str:
  """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
  name = name.removesuffix('.weight')
  if name in NAMES:
    return f'{NAMES[name]}.weight'
  _, _, layer, rest = name.split('.', 3)
  return f'blk.{layer}.{NAMES[rest]}.weight'


def write(path, fields, tensors, *, kind='F32', change=(), vocabulary=None):
  """A GGUF file of a Hugging Face config.json and its tensors.

  Args:
    fields: the config.json.
    tensors: Hugging Face's name -> array, or bytes of type `kind`.
    kind: the type of matrices; norms are float32.
    change: metadata to set after all others.
    vocabulary: (tokens, scores, types).
  """
  architecture = fields['model_type'].removesuffix('_text')
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(128)
  writer.add_embedding_length(fields['hidden_size'])
  writer.add_block_count(fields['num_hidden_layers'])
  writer.add_feed_forward_length(fields['intermediate_size'])
  writer.add_head_count(fields['num_attention_heads'])
  writer.add_head_count_kv(fields['num_key_value_heads'])
  writer.add_key_length(fields['head_dim'])
  writer.add_value_length(fields['head_dim'])
  writer.add_layer_norm_rms_eps(fields['rms_norm_eps'])
  writer.add_sliding_window(fields['sliding_window'])
  if architecture == 'gemma2':
    writer.add_attn_logit_softcapping(fields['attn_logit_softcapping'])
    writer.add_final_logit_softcapping(fields['final_logit_softcapping'])
  else:
    writer.add_rope_freq_base(1e6)
    kinds = [kind == 'sliding_attention' for kind in fields['layer_types']]
    writer.add_array(f'{architecture}.attention.sliding_window_pattern', kinds)
  for key, value in change:
    if isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_uint32(key, value)
  if vocabulary:
    tokens, scores, types = vocabulary
    writer.add_tokenizer_model('llama')
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
  of_matrices = gguf.GGMLQuantizationType[kind]
  for name, array in tensors.items():
    if array.dtype == np.uint8:
      writer.add_tensor(named(name), array, raw_dtype=of_matrices)
    elif array.ndim == 1:
      writer.add_tensor(named(name), array.astype(np.float32) + 1)
    else:
      data = gguf.quantize(array.astype(np.float32), of_matrices)
      writer.add_tensor(named(name), data, raw_dtype=of_matrices)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def fixture(name: str):
  """config.json and tensors of a folder that `transformers` wrote."""
  folder = FIXTURES / name
  tensors = {}
  for path in sorted(folder.glob('*.safetensors')):
    tensors |= {k: np.asarray(x) for k, x in load_file(path).items()}
  return json.loads((folder / 'config.json').read_text()), tensors


# A file of this query scale is a 27B's only: the fixture of Gemma 2 has another
# one, so its q_proj takes up the difference.
def scaled(fields, tensors):
  scalar, head_dim = fields['query_pre_attn_scalar'], fields['head_dim']
  return {
    name: x.astype(np.float32) * np.float32((head_dim / scalar) ** 0.5)
    if name.endswith('q_proj.weight')
    else x
    for name, x in tensors.items()
  }


@pytest.mark.parametrize('name', ['gemma2', 'gemma3'])
@pytest.mark.parametrize('kind', ['F32', 'BF16'])
def test_logits_are_those_of_transformers(name, kind, tmp_path):
  fields, tensors = fixture(name)
  tensors = scaled(fields, tensors)
  path = write(tmp_path / 'm.gguf', fields, tensors, kind=kind)
  gemma, params = weights.load('small', str(path))
  with np.load(FIXTURES / name / 'expected.npz') as file:
    tokens_BT, expected = file['tokens'], file['logits']
  found = jax.jit(lambda p, t: gemma.forward(p, t).logits_BTV)(
    params, tokens_BT
  )
  counts_BT = tokens_BT != 0
  error = np.abs(np.asarray(found)[counts_BT] - expected[counts_BT]).max()
  # The weights are bfloat16's, but for the scaled q_proj of Gemma 2.
  limit = 1e-4 if kind == 'F32' or name == 'gemma3' else 2e-2
  assert error < limit * np.abs(expected[counts_BT]).max()


SMALL = {
  'model_type': 'gemma3_text',
  'vocab_size': 8,
  'hidden_size': 256,
  'intermediate_size': 512,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 1,
  'head_dim': 128,
  'query_pre_attn_scalar': 128,
  'sliding_window': 5,
  'rms_norm_eps': 1e-6,
  'layer_types': ['sliding_attention'],
}


def small_shapes() -> dict[str, tuple[int, ...]]:
  """Hugging Face's names and shapes of `SMALL`."""
  width, inner, d_ff = 256, 256, 512
  shapes = {
    'self_attn.q_proj': (inner, width),
    'self_attn.k_proj': (inner // 2, width),
    'self_attn.v_proj': (inner // 2, width),
    'self_attn.o_proj': (width, inner),
    'mlp.gate_proj': (d_ff, width),
    'mlp.up_proj': (d_ff, width),
    'mlp.down_proj': (width, d_ff),
    'self_attn.q_norm': (128,),
    'self_attn.k_norm': (128,),
  }
  for norm in (n for n in NAMES if n.endswith('layernorm')):
    shapes[norm] = (width,)
  return {
    'model.embed_tokens.weight': (8, width),
    'model.norm.weight': (width,),
    **{f'model.layers.0.{name}.weight': s for name, s in shapes.items()},
  }


def quantised(kind: str, seed: int = 0):
  """Random blocks of a type, and Hugging Face's tensors of the same numbers."""
  rng, of = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
  raw, plain = {}, {}
  for name, shape in small_shapes().items():
    if len(shape) == 1:
      raw[name] = plain[name] = rng.normal(size=shape).astype(np.float32)
      continue
    size = gguf.quant_shape_to_byte_shape(shape, of)
    # Without two bits of each byte no float16 or float32 in it is infinite.
    raw[name] = rng.integers(0, 256, size, np.uint8) & np.uint8(0x3B)
    plain[name] = np.array(gguf.dequantize(raw[name], of))
  return raw, plain


@pytest.mark.parametrize('kind', KINDS)
def test_every_type_is_dequantised_into_its_place(kind, tmp_path):
  raw, plain = quantised(kind)
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind=kind)
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(SMALL))
  save_file(plain, folder / 'model.safetensors')
  _, expected = weights.load('small', str(folder))
  _, found = weights.load('small', str(path))
  for (key, a), (_, b) in zip(
    jax.tree_util.tree_leaves_with_path(expected),
    jax.tree_util.tree_leaves_with_path(found),
    strict=True,
  ):
    assert np.isfinite(a).all() and np.any(a), key
    # 1 + scale - 1 in float32.
    tolerance = 1e-6 if key[-1].key == 'scale' else 0
    np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=str(key))


def test_each_device_reads_its_part(tmp_path):
  """Sharded, in another dtype, and fewer layers: the same numbers."""
  raw, _ = quantised('Q8_0')
  path = str(write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0'))
  mesh = mesh_lib.make({'sae': 1, 'data': 4, 'latent': 2})
  _, expected = weights.load('small', path)
  _, found = weights.load('small', path, mesh=mesh, dtype='bfloat16')
  spec = found['layer_0']['mlp']['linear'].sharding.spec
  assert spec == jax.sharding.PartitionSpec('latent', 'data')
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    np.testing.assert_array_equal(a.astype(jnp.bfloat16), b)
  _, none = weights.load('small', path, num_layers=0)
  assert set(none) == {'embedder', 'final_norm'}


def test_the_quantisation_is_named(tmp_path):
  raw, _ = quantised('Q5_0')
  change = [('general.file_type', 8)]
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q5_0', change=change)
  assert weights.quantisation('small', str(path)) == 'GGUF Q5_0 (Q5_0)'
  raw, plain = quantised('F32')
  path = write(tmp_path / 'n.gguf', SMALL, plain)
  assert weights.quantisation('small', str(path)) == ''
  assert weights.quantisation('tiny') == ''


# ------------------------------------------------------------------- tokenizer

TEXTS = (
  'def f(x):\n    return  x + 12\n\n\n\tpass',
  'naïve 日本 🦊 a  b   c',
  '<start_of_turn>user\nhi<end_of_turn>',
  ' leading',
  'trailing  ',
  '\u3000',
  '<bos><eos><pad>',
)


def vocabulary_of(path) -> tuple[list, list, list]:
  """A SentencePiece model's pieces, as llama.cpp's converter writes them."""
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()
  model.ParseFromString(pathlib.Path(path).read_bytes())
  tokens, scores, types = [], [], []
  for piece in model.pieces:
    text, kind = piece.piece, piece.type
    if kind == piece.USER_DEFINED:
      text = text.replace('▁', ' ')
    if text.startswith('<') and text.endswith('>') and kind != piece.BYTE:
      kind = piece.CONTROL
    tokens.append(text)
    scores.append(piece.score)
    types.append(int(kind))
  return tokens, scores, types


def test_the_tokenizer_is_rebuilt(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  original = tokenizers.Tokenizer(str(weights.TINY / 'tokenizer.model'))
  raw, _ = quantised('Q8_0')
  words = vocabulary_of(original.path)
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0', vocabulary=words)
  model = weights.tokenizer('small', str(path))
  assert model.parent == tmp_path / 'cache' / 'gemma_scope'
  rebuilt = tokenizers.Tokenizer(str(model))
  assert rebuilt.sha256.startswith(model.stem.removeprefix('tokenizer-'))
  assert (rebuilt.pad_id, rebuilt.eos_id, rebuilt.bos_id) == (0, 1, 2)
  assert rebuilt.start_of_turn == original.start_of_turn
  for text in TEXTS:
    ids = rebuilt.encode(text)
    np.testing.assert_array_equal(ids, original.encode(text))
    assert rebuilt.decode(ids) == original.decode(original.encode(text))
  before = model.stat().st_mtime_ns
  assert weights.tokenizer('small', str(path)) == model
  assert model.stat().st_mtime_ns == before


# -------------------------------------------------------------------- refusals


def refused(path, words, name='small'):
  with pytest.raises(ValueError, match=words) as refusal:
    weights.load(name, str(path))
  assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(
  'change, words',
  [
    (('general.architecture', 'llama'), "architecture 'llama'"),
    (('split.count', 3), 'is one part of 3'),
    (('gemma3.attention.value_length', 7), 'value_length is 7'),
    (('gemma3.expert_count', 8), 'metadata gemma3.expert_count'),
    (('gemma3.block_count', 2), 'layer_types has 1 of 2 layers'),
    (('gemma3.attention.head_count', 4), 'has shape'),
    (('gemma3.rope.scaling.type', 'yarn'), "of type .*'yarn'"),
    (('gemma3.rope.freq_base_swa', 7), 'local rope_theta is 7'),
  ],
)
def test_a_model_that_is_not_computed_here_is_refused(change, words, tmp_path):
  raw, _ = quantised('Q8_0')
  path = tmp_path / 'm.gguf'
  write(path, SMALL, raw, kind='Q8_0', change=[change])
  refused(path, words)


def test_a_missing_key_and_another_size_are_refused(tmp_path):
  raw, _ = quantised('Q8_0')
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0')
  refused(path, 'is another model than gemma3-270m', 'gemma3-270m')
  data = path.read_bytes()
  key = b'gemma3.attention.key_length'
  assert data.count(key) == 1
  path.write_bytes(data.replace(key, key[:-1] + b'x'))
  refused(path, 'lacks the metadata gemma3.attention.key_length')


def test_damaged_files_are_refused(tmp_path):
  raw, _ = quantised('Q8_0')
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0')
  whole = path.read_bytes()
  for length in (0, 3, 4, 20, 200, 700):
    path.write_bytes(whole[:length])
    refused(path, 'is not a GGUF file|damaged or truncated')
  path.write_bytes(whole[:-200])
  refused(path, 'is truncated: .* lies beyond its end')
  path.write_bytes(b'GGML' + whole[4:])
  refused(path, 'is not a GGUF file')
  path.write_bytes(whole[:4] + b'\0\0\0\3' + whole[8:])  # big-endian
  refused(path, 'of GGUF version')
  refused(tmp_path / 'none.gguf', 'No checkpoint of small')
  name = b'blk.0.ffn_up.weight'
  at = whole.index(name) + len(name) + 4 + 2 * 8  # after its two sizes
  path.write_bytes(whole[:at] + b'\xe7\0\0\0' + whole[at + 4 :])
  refused(path, 'ffn_up.weight .* is of type 231')


def test_a_second_embedding_must_be_the_first(tmp_path, monkeypatch):
  raw, _ = quantised('Q8_0')
  monkeypatch.setitem(NAMES, 'lm_head', 'output')
  same = {**raw, 'lm_head.weight': raw['model.embed_tokens.weight']}
  path = write(tmp_path / 'm.gguf', SMALL, same, kind='Q8_0')
  weights.load('small', str(path))
  other = {**raw, 'lm_head.weight': raw['model.embed_tokens.weight'][::-1]}
  path = write(tmp_path / 'n.gguf', SMALL, other, kind='Q8_0')
  refused(path, 'output.weight')


def test_without_the_gguf_package(tmp_path, monkeypatch):
  raw, _ = quantised('Q8_0')
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0')
  gguf_file.library.cache_clear()
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(ImportError, match='run launch/setup.sh gemma3-270m'):
    weights.load('small', str(path))


# -------------------------------------------------------------------- packages


@pytest.fixture
def packaged(tmp_path, monkeypatch):
  """A model that two packages hold, in an empty cache."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.syspath_prepend(str(tmp_path / 'site'))
  raw, _ = quantised('Q8_0')
  path = write(tmp_path / 'm.gguf', SMALL, raw, kind='Q8_0')
  data = path.read_bytes()
  modules = [f'{tmp_path.name}_part{i}' for i in range(2)]
  for module, part in zip(modules, (data[:5000], data[5000:]), strict=True):
    package = tmp_path / 'site' / module
    package.mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'part').write_bytes(part)
  model = packages._Model(
    title='A model',
    file='small.gguf',
    sha256=packages.files.sha256(path),
    size=len(data),
    terms='https://terms',
    parts=tuple((module, 'part') for module in modules),
  )
  monkeypatch.setitem(packages.MODELS, 'small', model)
  packages._path.cache_clear()
  importlib.invalidate_caches()
  yield tmp_path, path
  packages._path.cache_clear()


def test_a_packaged_model_is_assembled_once(packaged, capfd):
  folder, path = packaged
  _, expected = weights.load('small', str(path))
  for checkpoint in ('', 'package:small'):
    _, found = weights.load('small', checkpoint)
    jax.tree.map(np.testing.assert_array_equal, expected, found)
  said = capfd.readouterr().err
  assert said.count('https://terms') == 1
  target = folder / 'cache' / 'gemma_scope' / 'small.gguf'
  assert target.read_bytes() == path.read_bytes()
  assert list(target.parent.iterdir()) == [target]
  # The cache is enough; a damaged one is made again.
  shutil.rmtree(folder / 'site')
  packages._path.cache_clear()
  weights.load('small')
  packages._path.cache_clear()
  target.write_bytes(b'GGUF')
  refused('package:small', 'small is not installed .*launch/setup.sh small')


def test_packages_that_are_damaged_leave_no_file(packaged):
  folder, _ = packaged
  (folder / 'site' / f'{folder.name}_part1' / 'part').write_bytes(b'x')
  refused('', 'packages of small are damaged')
  assert not list((folder / 'cache' / 'gemma_scope').iterdir())
  refused('package:gemma9', "no package of 'gemma9'")
