"""Gemma's parameters: from a checkpoint straight into their sharding.

A checkpoint is one of
  - a folder written by Orbax: Gemma's own release layout (flat keys such as
    `transformer/layer_0/attn/q_einsum`, or with layers of a kind stacked) or a
    nested tree; local or remote (gs://, s3://, ...), read with its cast and its
    sharding in one go;
  - a folder of Hugging Face's: config.json and *.safetensors (`hugging_face`);
  - a folder with config.json and *.safetensors whose tensors are named by
    their path in the tree (`layer_0/attn/q_einsum/w`): the embedded model;
  - a GGUF file, often quantised (`gguf`);
  - `package:NAME`, a GGUF file that the package index has (`packages`). '' is
    that one where the model has one.
All are checked, name by name and shape by shape, before a byte is trusted.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma_scope import files
from gemma_scope.language_model import (
  arguments,
  gguf,
  hugging_face,
  hugging_face_tensors,
  orbax_checkpoints,
  packages,
)
from gemma_scope.language_model import gemma as lm
from gemma_scope.language_model.orbax_checkpoints import CheckpointNotFound

TINY = pathlib.Path(__file__).parent / 'tiny'

# Parameter -> mesh axes: heads, MLP units and vocabulary on 'latent' (tensor
# parallel), one model axis on 'data' (FSDP). The first match counts; an axis
# that does not divide its dimension is dropped.
_SHARDING = (
  (r'input_embedding$', ('latent', 'data')),
  (r'attn/[qk]_einsum/w$', ('latent', 'data', None)),
  (r'attn/q?kv_einsum/w$', (None, 'latent', 'data', None)),
  (r'attn/attn_vec_einsum/w$', ('latent', None, 'data')),
  (r'mlp2?/gating_einsum$', (None, 'latent', 'data')),
  (r'mlp2?/linear$', ('latent', 'data')),
  (r'mlp/gating_einsum/w$', ('latent', None, None, 'data')),  # experts first
  (r'mlp/linear/w$', ('latent', None, 'data')),
  (r'mlp/router_logits/w$', ('data', None)),
  (r'per_layer_embeddings$', ('latent', None, 'data')),
  (r'per_layer_model_projection/w$', ('data', None, 'latent')),
  (r'per_layer_input_gate/w$', ('data', 'latent')),
  (r'per_layer_projection/w$', ('latent', 'data')),
  (r'scale$', (None,)),
)


def sharding(
  mesh: Mesh, name: str, shape: tuple[int, ...], transpose_gating: bool = True
) -> NamedSharding:
  """Where the parameter called `name` (path with slashes) lives on `mesh`."""
  axes = next(axes for rule, axes in _SHARDING if re.search(rule, name))
  if name.endswith('mlp/gating_einsum') and not transpose_gating:
    axes = (None, 'data', 'latent')  # [2, D, d_ff] in Gemma 2 2B
  axes = (
    axis if axis and size % mesh.shape[axis] == 0 else None
    for axis, size in zip(axes, shape, strict=True)
  )
  return NamedSharding(mesh, PartitionSpec(*axes))


def read_config(name: str, checkpoint: str = '') -> lm.AnyConfig:
  """The shape of model `name`; a folder's config.json defines its own.

  Raises:
    CheckpointNotFound: neither a known size nor a folder that describes itself.
  """
  if name in lm.SIZES and not checkpoint:
    return lm.SIZES[name]  # the shape alone needs no folder
  folder = _folder(name, checkpoint)
  if _is_gguf(folder):
    return gguf.config(name, folder)
  if name not in lm.SIZES:
    _refuse_missing(name, folder)
  fields = _described(folder)
  if hugging_face.is_described_by(fields):
    return hugging_face.config(name, fields, str(folder / 'config.json'))
  if isinstance(fields, dict) and fields.get('name') == name:
    shape = lm.config_class(fields)
    known = {field.name for field in dataclasses.fields(shape)}
    try:
      return shape(
        **{key: value for key, value in fields.items() if key in known}
      )
    except TypeError as error:
      raise CheckpointNotFound(
        f'{str(folder / "config.json")!r} does not describe a model ({error}); '
        'expected the fields of gemma_scope.lm.Config as JSON.'
      ) from error
  if name in lm.SIZES:
    return lm.SIZES[name]
  raise CheckpointNotFound(
    f'There is no model {name!r}: it is neither one of '
    f'{", ".join(["tiny", *lm.SIZES])} nor described by a config.json in '
    f'{str(folder)!r}.'
  )


def check_there(name: str, checkpoint: str = '') -> None:
  """Refuses a checkpoint that does not exist, without reading it.

  Raises:
    CheckpointNotFound: with what was looked for.
  """
  _refuse_missing(name, _folder(name, checkpoint))


def tokenizer(name: str, checkpoint: str = '') -> pathlib.Path:
  """The model's own tokenizer: a SentencePiece model file.

  It lies beside the parameters or in the GGUF file; models that this project
  trained have the embedded one where none lies beside them.

  Raises:
    CheckpointNotFound: there is none.
  """
  folder = _folder(name, checkpoint)
  if _is_gguf(folder):
    return gguf.tokenizer(folder, packages.cache())
  path = folder / 'tokenizer.model'
  if _is_local(folder) and path.is_file():
    return path
  if name in lm.SIZES or hugging_face.is_described_by(_described(folder)):
    raise CheckpointNotFound(
      f'{name} needs its tokenizer, and there is no tokenizer.model in '
      f'{str(folder)!r}: set lm.tokenizer (--tokenizer) to the SentencePiece '
      'model of the Gemma that it was made from.'
    )
  return TINY / 'tokenizer.model'


def quantisation(name: str, checkpoint: str = '') -> str:
  """How the weights were rounded before they came here; '' where not at all.

  For GGUF files: 'GGUF Q4_K_M (Q8_0, Q5_0, Q6_K, Q4_K)', say.
  """
  folder = _folder(name, checkpoint)
  return gguf.quantisation(folder) if _is_gguf(folder) else ''


def special_ids(name: str, checkpoint: str = '') -> dict[str, int]:
  """{'bos': id} where a Hugging Face folder or a GGUF file names it.

  Its padding and EOS say how a fine-tune generates, not what was trained.
  """
  if not checkpoint or '://' in checkpoint:
    return {}
  folder = _folder(name, checkpoint)
  if _is_gguf(folder):
    return gguf.special_ids(folder)
  fields = _described(folder)
  bos = fields.get('bos_token_id') if isinstance(fields, dict) else None
  return {'bos': bos} if type(bos) is int else {}


def shapes(
  name: str,
  checkpoint: str,
  dtype: str,
  mesh: Mesh | None,
  num_layers: int | None,
) -> tuple[lm.Gemma, dict[str, jax.ShapeDtypeStruct]]:
  """The model, and its parameters' shapes and places by path, unread.

  Args: those of `load`.
  """
  config = read_config(name, checkpoint)
  pin = None
  if mesh is not None:
    pin = NamedSharding(mesh, PartitionSpec('data', None, None))
  gemma = lm.Gemma(config, pin)
  needed = {}
  for key, shape in traverse_util.flatten_dict(
    gemma.param_shapes, sep='/'
  ).items():
    layer = re.match(r'layer_(\d+)/', key)
    if layer and num_layers is not None and int(layer[1]) >= num_layers:
      continue
    target_sharding = (
      jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      if mesh is None
      else sharding(mesh, key, shape.shape, config.transpose_gating)
    )
    needed[key] = jax.ShapeDtypeStruct(
      shape.shape, jnp.dtype(dtype), sharding=target_sharding
    )
  return gemma, needed


def load(
  name: str,
  checkpoint: str = '',
  *,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  num_layers: int | None = None,
) -> tuple[lm.Gemma, lm.Params]:
  """Loads a Gemma and its parameters.

  Args:
    name: 'tiny' (embedded), a key of `lm.SIZES`, or the name in the folder's
      config.json.
    checkpoint: folder of the checkpoint; '' is the embedded one of 'tiny'.
    dtype: parameters are cast to it on the way in; also the compute dtype.
    mesh: shards parameters by the table above and pins the residual stream to
      ('data',); None puts all on the first local device.
    num_layers: loads only the first layers (enough for taps without logits).

  Raises:
    CheckpointNotFound: with what was looked for and what was found.
  """
  arguments.dtype(dtype)
  folder = _folder(name, checkpoint)
  _refuse_missing(name, folder)
  gemma, needed = shapes(name, checkpoint, dtype, mesh, num_layers)
  all_shapes = traverse_util.flatten_dict(gemma.param_shapes, sep='/')
  if _is_gguf(folder):
    flat = gguf.read(folder, all_shapes, needed)
  elif hugging_face.is_described_by(_described(folder)):
    flat = hugging_face_tensors.read(folder, all_shapes, needed)
  elif _is_local(folder) and any(folder.glob('*.safetensors')):
    flat = _from_safetensors(folder, needed)
  else:
    flat = orbax_checkpoints.read(folder, needed)
  return gemma, traverse_util.unflatten_dict(flat, sep='/')


def save_safetensors(
  folder: pathlib.Path, config: lm.AnyConfig, params: lm.Params, extra: dict
) -> None:
  """Writes config.json (with `extra` facts) and model.safetensors."""
  from safetensors import numpy as safetensors_numpy

  folder.mkdir(parents=True, exist_ok=True)
  flat = traverse_util.flatten_dict(params, sep='/')
  safetensors_numpy.save_file(
    {key: np.ascontiguousarray(value) for key, value in flat.items()},
    folder / 'model.safetensors',
  )
  fields = {**dataclasses.asdict(config), **extra}
  files.write_json(folder / 'config.json', fields, indent=2)


def _folder(name: str, checkpoint: str):
  if not checkpoint:
    if name == 'tiny':
      return TINY
    if name in packages.MODELS:
      return packages.path(name)
    raise CheckpointNotFound(
      f'{name} needs a checkpoint: set lm.checkpoint to the folder of an Orbax '
      'checkpoint (a local path or gs://...), to that of a Hugging Face '
      'download, or to a GGUF file.'
    )
  if checkpoint.startswith(packages.PREFIX):
    return packages.path(checkpoint.removeprefix(packages.PREFIX))
  if '://' in checkpoint:
    from etils import epath

    return epath.Path(checkpoint)
  return pathlib.Path(checkpoint).expanduser().absolute()


def _refuse_missing(name: str, folder) -> None:
  if _is_local(folder) and not folder.exists():
    raise CheckpointNotFound(
      f'No checkpoint of {name} at {str(folder)!r}: expected a folder written '
      'by Orbax, one with config.json and safetensors, or a GGUF file.'
    )


def _described(folder) -> Any:
  """The content of a folder's config.json; None where there is none."""
  path = folder / 'config.json'
  if not _is_local(folder) or not path.is_file():
    return None
  try:
    return json.loads(path.read_text('utf-8'))
  except ValueError as error:
    raise CheckpointNotFound(f'{str(path)!r} is not JSON ({error}).') from error


def _is_local(folder) -> bool:
  return '://' not in str(folder)


def _is_gguf(folder) -> bool:
  return _is_local(folder) and folder.is_file()


def _from_safetensors(folder: pathlib.Path, needed: dict) -> dict:
  from safetensors import SafetensorError, safe_open

  path_of, shapes = {}, {}
  for path in sorted(folder.glob('*.safetensors')):
    try:
      with safe_open(path, framework='np') as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
          path_of[key] = path
          shapes[key] = file.get_slice(key).get_shape()
    except SafetensorError as error:
      raise CheckpointNotFound(
        f'{str(path)!r} is not a whole safetensors file ({error}).'
      ) from error
  orbax_checkpoints.check(shapes, needed, folder)
  flat = {}
  for path in sorted(set(path_of.values())):
    # numpy has no bfloat16 of its own: the flax reader knows ml_dtypes'.
    with safe_open(path, framework='flax') as file:
      for key, target in needed.items():
        if path_of[key] == path:
          value = file.get_tensor(key).astype(target.dtype)
          flat[key] = jax.device_put(value, target.sharding)
  return flat
