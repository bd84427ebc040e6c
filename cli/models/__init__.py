"""Models without a hub: small checkpoints that are built on the spot, in the layout that Hugging Face checkpoints have.

`make_model(name, directory)` builds one of the named models; `random_checkpoint(directory, config, ...)` builds random
weights for any `config.json` of a family that is served. Both need no network, except for the model `demo`.
"""

from elasticmoe.cli.models.checkpoint import DTYPES
from elasticmoe.cli.models.make import make_model, model_names
from elasticmoe.cli.models.random_weights import random_checkpoint

__all__ = ["DTYPES", "make_model", "model_names", "random_checkpoint"]
