"""What a model family is to this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elasticmoe.common.families.config import Config, Key
from elasticmoe.common.model_spec import Dtype, ModelSpec, RecordSpec


class Family(NamedTuple):
    """One model family: what its config.json means, and the records that its weights are stored in.

    `model_type` and `architecture`: its names in config.json. `keys`: all of its config class, by name; `spellings`:
    other name of a key -> the key. `parse` gives the fields of ModelSpec that are the family's own to say. `expert`,
    `layer` and `base` build the three kinds of records, the last two by the tp index of their rank. `renamed`: parts of
    tensors' names that transformers renames when it loads, old -> new; `expert_names` finds layer and expert in the
    (new) name of one expert's tensor.
    `embedding` and `head`: the two tensors that a tied head may make one; empty where the family ties nothing. `dtype`:
    what it is served in, whatever is asked for; None: as asked.
    """

    name: str
    model_type: str
    architecture: str
    keys: Mapping[str, Key]
    spellings: Mapping[str, str]
    parse: Callable[[Config], dict[str, Any]]
    expert: Callable[[ModelSpec, int, int], RecordSpec]
    layer: Callable[[ModelSpec, int, int], RecordSpec]
    base: Callable[[ModelSpec, int], RecordSpec]
    renamed: Mapping[str, str] = {}
    expert_names: re.Pattern[str] | None = None
    embedding: str = ""
    head: str = ""
    dtype: Dtype | None = None

    def canonical(self, name: str) -> str:
        """A stored tensor's name without what may differ: the name of the base model before it, and old parts."""
        for old, new in self.renamed.items():
            name = name.replace(old, new)
        while name.startswith("model."):
            name = name.removeprefix("model.")
        return name
