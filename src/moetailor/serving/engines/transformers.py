"""transformers: loads whatever is written here, with moetailor imported."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from moetailor.checkpoint.facts import ModelFacts
from moetailor.errors import MoetailorError
from moetailor.serving.choices import Choice
from moetailor.serving.engine import Engine, Served, register_engine


class Transformers(Engine):
    """Activations of a long prompt and the allocator take a tenth."""

    name = "transformers"
    overhead = Fraction(1, 10)
    harness = "hf"

    def choices(self, facts: ModelFacts) -> Sequence[Choice]:
        """Return bits and stand-ins, bits alone, and fewer experts."""
        ours = "transformers"
        return (
            Choice(name="bits and stand-ins", method="auto", format="moetailor", loads=ours),
            Choice(
                name="4 bits for all",
                method="quantize",
                parameters={"bits": 4},
                format="moetailor",
                rule="one width",
                loads=ours,
            ),
            Choice(
                name="fewer experts",
                method="refit",
                parameters={"neurons": "chosen"},
                format="native",
                rule="narrower experts",
                loads="transformers, vLLM, llama.cpp",
            ),
        )

    def refusal(self, written: str) -> str | None:
        """Refuse nothing."""
        return None

    def command(self, served: Served) -> list[str]:
        """Return the command of moetailor, which serves by transformers what that alone would not know."""
        if served.binary is not None:
            raise MoetailorError("--binary: transformers is served by moetailor's own program; leave it out")
        if served.folder.exists() and "@" in str(served.folder):
            told = "its server takes what follows @ for a revision, and would look for another model"
            raise MoetailorError(f"{served.folder}: {told}; rename the folder, or go there and name it from there")
        command = ["moetailor", "serve", str(served.folder), "--engine", self.name]
        return [*command, "--host", served.host, "--port", str(served.port)]

    def absent(self, served: Served) -> str | None:
        """Say what transformers needs to serve."""
        from transformers.utils.import_utils import is_serve_available

        return None if is_serve_available() else "transformers cannot serve here: pip install 'moetailor[serve]'"

    def serve(self, served: Served) -> None:
        """Run the server of transformers in this process, where our format is registered."""
        if (told := self.absent(served)) is not None:
            raise MoetailorError(told)
        from huggingface_hub.constants import HF_HUB_CACHE
        from transformers.cli.serve import Serve

        # Whoever asks which models there are is refused where nothing was ever downloaded.
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
        Serve(force_model=str(served.folder), host=served.host, port=served.port)


register_engine(Transformers())
