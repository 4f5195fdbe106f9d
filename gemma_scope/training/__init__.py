"""Many SAEs trained from one pass of the language model.

Reading order; a module imports only from those above it:

  objectives  the loss of one SAE
  resampling  dead latents begun anew
  optimizer   Adam with beta1 = 0, the schedules of a run
  stack       many SAEs of one shape: state, step, sharding table
  end_to_end  fine-tuning by KL, through the language model
  setup       a config -> text, rows, stacks; trained members
  initialise  members that start from a release's
  loop        the loop
"""
