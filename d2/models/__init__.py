"""The networks of stage 1: modules are named as in the checkpoints, hyper-parameters stand beside them."""
