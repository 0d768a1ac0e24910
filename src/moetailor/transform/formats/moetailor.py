"""Moetailor: slot maps in config.json, the answers' tensors beside the pool; transformers loads it with the plug-in."""

from __future__ import annotations

from typing import Any

from moetailor.checkpoint.coded import source_entry
from moetailor.checkpoint.config import IMPLEMENTATION
from moetailor.checkpoint.family import QUANT_METHOD
from moetailor.planning.plan import Plan
from moetailor.runtime.quantizer import MoetailorConfig
from moetailor.transform.formats.format import Format


class Moetailor(Format):
    """The form that holds every plan."""

    name = "moetailor"
    automatic = True
    loading = "Loads in transformers after `import moetailor` (`pip install moetailor`):"
    example = """
```python
import moetailor
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

    def refusal(self, plan: Plan) -> None:
        """Refuse nothing."""

    def config(self, original: dict, config: Any, plan: Plan) -> dict:
        """Return the config with the slot maps as its quantization, in them how the original's weights lie, and what
        stops transformers where moetailor is not imported.
        """
        if not plan.layers:
            return original
        entry = MoetailorConfig.of(plan.slot_maps, source=source_entry(original))
        return original | {"quantization_config": entry.to_dict(), IMPLEMENTATION: QUANT_METHOD}
