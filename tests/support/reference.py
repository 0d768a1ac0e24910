"""The reference model and its calibration text, as words of a command."""

from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-moe"
TEXT = ["--data", str(REFERENCE / "calibration.jsonl"), "--sequences", "4", "--length", "64"]
