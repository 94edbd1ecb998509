"""Which parts of torch this process is going to use.

Decided before ``transformers_import`` is imported, which leaves out the others.
"""

sharded_tensors = False  # torch.distributed.tensor: of a model that several ranks share
