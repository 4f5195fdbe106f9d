"""The default: 36 SAEs on the embedded Gemma, on a CPU, in minutes.

  bash launch/demo.sh
  .venv/bin/python launch/train.py --config=configs/tiny.py --workdir=runs/tiny

Model: `tiny`, 4 layers, d = 128, trained on Python's own library. Text: the
library of the Python that runs this. Sites: the paper's three at layers 1 and
2; two widths and three target L0 at each. Hardware: 2 CPU cores, about 6
minutes, 2 GB. Expected: docs/demo/. This file also documents every field.
"""

from ml_collections import ConfigDict

from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = ConfigDict()
  config.seed = 0

  config.lm = lm = ConfigDict()
  lm.name = 'tiny'  # or gemma2-2b, gemma3-1b, ... (gemma_scope/lm.py)
  lm.checkpoint = ''  # folder of the checkpoint; '' is the embedded one
  lm.tokenizer = ''  # SentencePiece file; '' is the embedded one
  lm.dtype = 'float32'

  config.text = text = ConfigDict()
  text.source = 'python'  # files:..., arrayrecord:..., tfds:... (text.py)
  text.store = ''  # a folder by launch/prepare_text.py; '' makes one
  text.seq_len = 128  # tokens a sequence, with BOS

  config.mesh = mesh = ConfigDict()  # sizes multiply to the devices; -1: rest
  mesh.sae = 1
  mesh.data = -1
  mesh.latent = 1

  config.activations = activations = ConfigDict()
  activations.store = ''  # a folder by launch/harvest.py; '' runs the model
  activations.chunk_rows = 2**16  # shuffled together; the paper has about 10^6
  activations.lm_batch = 32  # sequences a forward pass
  activations.dtype = 'float32'  # of rows in a chunk and in a store
  activations.memory = 'auto'  # where a chunk lives: 'device', 'host'

  config.collection = collection = ConfigDict()  # all combinations of:
  collection.layers = (1, 2)
  collection.sites = ('attn_out', 'mlp_out', 'resid_post')
  collection.widths = (512, 1024)
  collection.architecture = 'jumprelu'  # or 'relu'
  collection.penalty = 'target_l0'  # or 'l0'; 'l1' for relu
  collection.sparsity = (
    8.0,
    16.0,
    32.0,
  )  # target L0, or the penalty's coefficient
  collection.seeds = (0,)

  config.sae = sae = ConfigDict()
  sae.bandwidth = 0.02  # the paper's 0.001 needs its 10^9 tokens
  sae.initial_threshold = 0.05
  sae.log_threshold = True
  sae.pre_encoder_bias = True
  sae.matmul_dtype = 'float32'

  config.train = train = ConfigDict()
  train.steps = 800
  train.batch = 256  # rows a step, of every site
  train.learning_rate = 1.2e-2  # the paper: 7e-5 over 10^6 steps
  train.warm_up = 50  # steps of the cosine warm-up from 0.1
  train.decay = 300  # last steps, linear to 0
  train.sparsity_warm_up = 200
  train.sparsity_strength = 1.0  # of the target form
  train.threshold_rate = 2.0  # factor on the thresholds' learning rate
  train.b2 = 0.999  # Adam; beta1 is 0
  train.eps = 1e-8
  train.clip = 0.0  # bound on a member's gradient norm; 0: none
  train.dead_after = 100_000  # tokens without firing

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every = 200  # steps
  checkpoint.keep = 2

  config.metrics = metrics = ConfigDict()
  metrics.every = 20  # steps
  metrics.tensorboard = False
  metrics.wandb_project = ''

  config.evaluation = evaluation = ConfigDict()
  evaluation.sequences = 128  # held out (the paper: 2048); 0: none
  evaluation.batch = 16
  return config_lib.apply_argument(config, argument)
