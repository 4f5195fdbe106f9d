"""Many SAEs trained from one pass of the language model.

Reading order; a module imports only from those above it:

  prefixes    of a Matryoshka SAE, on latents that devices share
  objectives  the loss of one SAE
  resampling  dead latents begun anew
  optimizer   Adam and the schedules of a run
  stack       many SAEs of one shape: state, step, sharding table
  closing     after the last step: L0 at its target, decoders refitted
  end_to_end  fine-tuning by the KL of the spliced model
  setup       a config -> text, activations, stacks
  auto_mesh   sizes of the mesh's axes, by arithmetic
  two_models  whether two models can be compared
  trained     parameters and cards of trained SAEs
  initialise  SAEs that start from a release
  loop        the training loop
"""
