"""The PyTorch front end: observe what a block does, solve for the mixture, cut, verify, install.

Reading order: oplog and recorder (what a run did), linears and batched (products with weights), instances, banks and
body (the expert's formula), direct and solve (which tensors are x, experts, weights and y), sliced and program (the
block around them), moe and ffn (one candidate), analyse (a model), calls and install (the live module).
"""
