"""The default: 36 SAEs on the embedded Gemma, on a CPU, in minutes.

  bash launch/demo.sh
  .venv/bin/python launch/train.py --config=configs/tiny.py --workdir=runs/tiny

Model: `tiny`, 4 layers, d = 128, trained on Python's own library. Text: the
standard library of the Python that runs this. Sites: the paper's three at
layers 1 and 2; two widths and three target L0 at each. Hardware: 2 CPU cores,
about 6 minutes, 2 GB. Expected: docs/demo/. This file also documents every
field. For a real model: configs/gemma3_270m.py.
"""

from ml_collections import ConfigDict

from gemma_scope import config as config_lib


def get_config(argument: str | None = None) -> ConfigDict:
  config = ConfigDict()
  config.seed = 0

  config.lm = lm = ConfigDict()
  lm.name = 'tiny'  # or gemma3-270m, gemma2-2b, ... (language_model/gemma.py)
  lm.checkpoint = ''  # folder of the checkpoint; '' is the embedded one
  lm.tokenizer = ''  # SentencePiece file; '' is the embedded one
  lm.dtype = 'float32'
  # A model to compare with this one, by crosscoders of the two: its name ('':
  # the same) and its checkpoint ('': its own). Both '': there is none.
  lm.second = second = ConfigDict()
  second.name = ''
  second.checkpoint = ''

  config.text = text = ConfigDict()
  text.source = 'python'  # prose, files:..., hf:... (text/sources.py)
  text.column = ''  # in .jsonl, .parquet, data sets; '': 'text' or the only one
  text.store = ''  # a folder by launch/prepare_text.py; '' makes one
  text.seq_len = 128  # tokens in a sequence, with BOS

  # Devices on each axis: -1 takes those that are left, 0 is chosen from the
  # number of SAEs, their widths and the devices' memory (--config.mesh=auto
  # sets all three to 0).
  config.mesh = mesh = ConfigDict()
  mesh.sae = 1
  mesh.data = -1
  mesh.latent = 1

  config.activations = activations = ConfigDict()
  activations.store = ''  # a folder by launch/harvest.py; '' runs the model
  activations.chunk_rows = 2**16  # shuffled together; the paper has about 10^6
  activations.lm_batch = 32  # sequences in a forward pass
  activations.dtype = 'float32'  # of rows in a chunk and in a store
  activations.centre = 'none'  # or 'mean', 'geometric_median': subtracted
  # What a site's rows are divided by; also 'centred_rms', and 'sqrt_d' as for
  # the paper's transcoders
  activations.scale = 'rms'
  # Rows with a norm above this many medians are outliers and left out; 0: none.
  activations.max_norm = 0.0
  activations.memory = 'auto'  # where a chunk is kept: 'device', 'host'
  activations.ahead = 'auto'  # make the next chunk meanwhile: 'on', 'off'

  config.collection = collection = ConfigDict()  # all combinations of:
  collection.layers = (1, 2)
  # Also 'mlp_out/2': at that layer alone.
  collection.sites = ('attn_out', 'mlp_out', 'resid_post')
  collection.widths = (512, 1024)
  # 'transcoder', 'clt', 'crosscoder' (over layers, or of two models)
  collection.type = 'sae'
  collection.skip = False  # an affine path past a transcoder's latents
  # 'topk', 'batch_topk', 'gated', 'relu'; each also after 'matryoshka_'
  collection.architectures = ('jumprelu',)
  # jumprelu: 'l0', 'quadratic_l0', 'quadratic_frequency', 'tanh'; gated and
  # relu: 'l1'; all: 'target_l0'
  collection.penalty = 'target_l0'
  # Target L0, or the penalty's coefficient.
  collection.sparsity = (8.0, 16.0, 32.0)
  collection.seeds = (0,)
  # Controls beside each: 'frozen_decoder', 'soft_frozen_decoder',
  # 'frozen_encoder'
  collection.nulls = ()

  config.sae = sae = ConfigDict()
  sae.bandwidth = 0.02  # the paper's 0.001 is for 10^9 tokens
  sae.initial_threshold = 0.05
  sae.log_threshold = True
  sae.ste_to_input = False  # the estimator's gradient reaches the encoder
  sae.pre_encoder_bias = True
  sae.unit_decoder = True  # False: norms are free, and weigh the penalty
  # Matryoshka prefixes, as shares of the width.
  sae.matryoshka = (0.0625, 0.125, 0.25, 0.5, 1.0)
  sae.matmul_dtype = 'float32'

  config.objective = objective = ConfigDict()  # see training/objectives.py
  objective.strength = 1.0  # of the penalties that have a target
  objective.prefactor = 2.0  # of quadratic_l0
  objective.p0 = 0.01  # of quadratic_frequency
  objective.tanh_scale = 4.0
  objective.frequency = 0.0  # penalty on latents that fire on more than ...
  objective.frequency_limit = 0.1  # ... this share of rows
  objective.pre_act = 0.0  # these two revive dead latents
  objective.auxk = 0.0  # 1/32 in the TopK paper
  objective.auxk_latents = 0  # 0: half of d
  objective.active_set = False  # also train on f after one gradient step

  config.initialise = initialise = ConfigDict()
  initialise.release = ''  # a release to start from; '' starts at random
  initialise.layer = -1  # of the release's SAEs; -1 is the SAE's own layer
  initialise.whitening = 0.0  # 0.5: latents start along the rows' covariance

  config.end_to_end = end_to_end = ConfigDict()  # fine-tuning by KL
  end_to_end.beta = 0.0  # weight of KL against the error; 0 turns it off
  end_to_end.sequences = 2  # in a step: batch = sequences * (seq_len - 1)

  config.train = train = ConfigDict()
  train.steps = 800
  train.batch = 256  # rows in a step, of every site
  train.learning_rate = 1.2e-2  # the paper: 7e-5 over 10^6 steps
  train.warm_up = 50  # steps of the cosine warm-up from 0.1
  train.decay = 300  # last steps, linear to 0
  train.sparsity_warm_up = 200
  train.initial_l0 = 0.0  # from which every target L0 falls to its value ...
  train.l0_steps = 0  # ... over so many steps
  train.threshold_rate = 2.0  # factor on the thresholds' learning rate
  train.b1 = 0.0  # Adam; the paper's is 0
  train.b2 = 0.999
  train.eps = 1e-8
  train.clip = 0.0  # bound on an SAE's gradient norm; 0 is none
  train.theta_decay = 0.99  # of the running mean of BatchTopK's threshold
  train.adaptive_rate = 0.05  # of the L1 coefficient that meets a target L0
  train.dead_after = 100_000  # tokens without firing make a latent dead
  train.resample_every = 0  # steps between resamplings of dead latents
  # Active latents per row that a sparse step has room for; 0 is always dense.
  train.active_limit = 0
  train.meet_l0 = False  # after the last step, set thresholds to meet L0
  train.refit_decoders = False  # then fit the decoders by least squares
  train.closing_batches = 64  # batches for both

  config.checkpoint = checkpoint = ConfigDict()
  checkpoint.every = 200  # steps
  checkpoint.keep = 2

  config.metrics = metrics = ConfigDict()
  metrics.every = 20  # steps
  metrics.tensorboard = False
  metrics.wandb_project = ''

  config.evaluation = evaluation = ConfigDict()
  evaluation.sequences = 128  # held out (the paper: 2048); 0 is none
  evaluation.batch = 16
  # Losses and KL at every n-th token: where the vocabulary is wide, forming
  # logits is what an evaluation costs.
  evaluation.loss_every = 1
  return config_lib.apply_argument(config, argument)
