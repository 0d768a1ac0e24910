"""What a shell is offered: verbs, flags, and methods, for which torch is not loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moetailor
from moetailor_cli.completion import complete_method, complete_methods, method_names

CODE = """
import sys
sys.argv = ["moetailor"]
from moetailor_cli.app import main
try:
    main()
except SystemExit:
    print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


def offered(words: str) -> list[str]:
    asked = {"_MOETAILOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    ran = subprocess.run([sys.executable, "-c", CODE], env=os.environ | asked, capture_output=True, text=True)
    return ran.stdout.split()


def test_the_names_read_off_the_files_are_those_registered() -> None:
    assert method_names() == sorted(moetailor.METHODS)


def test_names_are_completed() -> None:
    assert complete_method("re") == [name for name in sorted(moetailor.METHODS) if name.startswith("re")]
    assert complete_method("mon") == ["mone"]
    assert complete_methods("mone,al") == ["mone,all"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("moetailor evalu", ["evaluate"]),
        ("moetailor calibrate --sample-t", ["--sample-tokens"]),
        ("moetailor plan calib -m mon", ["mone"]),
        ("moetailor methods light", ["lightmoe"]),
        ("moetailor compare MODEL --methods reap,lin", ["reap,linear"]),
    ],
)
def test_a_shell_is_offered_what_may_follow(words: str, expected: list[str]) -> None:
    assert offered(words) == expected


def test_the_program_installs_its_completion(tmp_path: Path) -> None:
    """As a shell in which it was started would have it: typer asks the environment of tests which that is."""
    code = CODE.replace('["moetailor"]', '["moetailor", "--install-completion", "bash"]')
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "bash completion installed" in ran.stdout, ran.stderr
    (script,) = tmp_path.rglob("moetailor.sh")
    assert "_MOETAILOR_COMPLETE=complete_bash" in script.read_text()
