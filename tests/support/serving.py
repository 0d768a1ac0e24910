"""Kinds of results, and what each engine makes of them: tests run over these pairs, and docs/serving.md lists them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import moetailor

HERE, PLUGIN = "tests/test_engines.py", "plugins/vllm/tests/test_serving.py"
TRANSFORMERS, ALONE, SERVED, LLAMA, SGLANG = (
    "transformers",
    "vLLM alone",
    "vLLM with moetailor-vllm",
    "llama.cpp",
    "SGLang 0.5.23",
)
# What says so of each engine, by outcome: the test that runs over the pairs, or what was read.
BY: dict[str, dict[str, str]] = {
    TRANSFORMERS: {
        "run": f"{HERE}::test_transformers_gives_what_the_plan_gives",
        "refused": f"{HERE}::test_what_an_engine_does_not_load_is_refused",
    },
    ALONE: {
        "run": f"{PLUGIN}::test_vllm_alone_loads_native_results_and_refuses_ours",
        "refused": f"{PLUGIN}::test_vllm_alone_loads_native_results_and_refuses_ours",
        "read": "vLLM 0.32 and 0.33",
    },
    SERVED: {
        "run": f"{PLUGIN}::test_every_kind_is_served",
        "refused": f"{PLUGIN}::test_what_does_not_fit_is_refused_by_name",
    },
    LLAMA: {
        "run": "tests/test_llama_cpp.py::test_llama_cpp_answers_with_what_fit_wrote",
        "refused": f"{HERE}::test_what_an_engine_does_not_load_is_refused",
    },
    SGLANG: {"read": "its source", "refused": "its source, not run: its table of quantization methods has no other"},
}
NATIVE = {TRANSFORMERS: "run", ALONE: "run", SERVED: "as alone", LLAMA: "refused", SGLANG: "read"}
PACKED = {TRANSFORMERS: "run", ALONE: "read", SERVED: "as alone", LLAMA: "refused", SGLANG: "read"}
# Loaded by transformers, and by no other engine here.
QUANTIZED = {TRANSFORMERS: "run", ALONE: "-", SERVED: "as alone", LLAMA: "refused", SGLANG: "-"}
OURS = {TRANSFORMERS: "run", ALONE: "refused", SERVED: "run", LLAMA: "refused", SGLANG: "refused"}
GGUF = {TRANSFORMERS: "refused", ALONE: "refused", SERVED: "as alone", LLAMA: "run", SGLANG: "-"}
OWN_KERNELS = {ALONE: f"{PLUGIN}::test_vllm_alone_runs_few_bits_by_its_own_kernels"}
NO_GGUF = dict.fromkeys((TRANSFORMERS, ALONE), f"{HERE}::test_a_gguf_file_is_for_llama_cpp")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of result.

    Attributes:
        says: what it is.
        outcomes: what each engine makes of it: one of `run`, `refused`, `read`, `as alone`, or `-` where nobody looked.
        method: how one is made of a tiny model; empty where other tests make it.
        budget: of the plan.
        options: of the plan.
        format: of the result.
        memory: of `fit`, which makes those that llama.cpp runs of the reference model.
        by: the test of an engine that is no other kind's.
    """

    says: str
    outcomes: Mapping[str, str]
    method: str = ""
    budget: Mapping[str, Any] = field(default_factory=lambda: {"remove": "50%"})
    options: Mapping[str, Any] = field(default_factory=dict)
    format: str = "moetailor"
    memory: str = ""
    by: Mapping[str, str] = field(default_factory=dict)

    def plan(self, calibration: moetailor.Calibration) -> moetailor.Plan:
        """Return a plan of its kind."""
        return moetailor.make_plan(
            calibration, self.method, moetailor.Budget.parse(**self.budget), **dict(self.options)
        )


def rounded(says: str, **parameters: Any) -> Kind:
    """Return all experts in few bits, in moetailor format."""
    options = {"parameters": parameters}
    return Kind(says=says, method="quantize", budget={"remove": "0%"}, options=options, outcomes=OURS)


def packed(says: str, outcomes: Mapping[str, str] = PACKED, **parameters: Any) -> Kind:
    """Return all experts in few bits, as compressed-tensors."""
    more: dict[str, Any] = {"options": {"parameters": parameters}, "format": "compressed-tensors"}
    more |= {"by": OWN_KERNELS} if outcomes[ALONE] == "run" else {}
    return Kind(says=says, method="quantize", budget={"remove": "0%"}, outcomes=outcomes, **more)


KINDS: dict[str, Kind] = {
    "native refit": Kind(says="native: slots dropped (`refit`)", method="refit", format="native", outcomes=NATIVE),
    "native narrow": Kind(
        says="narrow: experts with fewer neurons (`camera`, `auto --native`)",
        method="camera",
        format="narrow",
        outcomes=NATIVE,
    ),
    "native ream": Kind(says="native: experts merged (`ream`)", method="ream", format="native", outcomes=NATIVE),
    "expanded": Kind(
        says="expanded: remaps written out (`conmoe`)", method="conmoe", format="expanded", outcomes=NATIVE
    ),
    "int4": packed("compressed-tensors: 4 bits", PACKED | {ALONE: "run"}, bits=4, codes="int", group=32),
    "int8": packed("compressed-tensors: 8 bits", bits=8, codes="int", group=32),
    "fp8": packed("compressed-tensors: FP8 by row", bits=8, codes="fp8"),
    "fp8b128": packed(
        "compressed-tensors: FP8 by block", PACKED | {TRANSFORMERS: "refused", ALONE: "run"}, bits=8, codes="fp8b128"
    ),
    "nvfp4": packed("compressed-tensors: NVFP4", PACKED | {TRANSFORMERS: "refused"}, codes="nvfp4"),
    "gguf bits": Kind(says="GGUF: bits by layer (`fit`)", memory="9MB", format="gguf", outcomes=GGUF, by=NO_GGUF),
    "gguf fewer": Kind(
        says="GGUF: fewer experts in 4 bits (`fit`)", memory="8MB", format="gguf", outcomes=GGUF, by=NO_GGUF
    ),
    "vllm-mone": Kind(
        says="vllm-mone: constants (`mone`)",
        outcomes=QUANTIZED | {TRANSFORMERS: "refused", ALONE: "run"},
        by={
            TRANSFORMERS: "tests/contract/test_vllm_mone.py::test_transformers_alone_does_not_load_it",
            ALONE: f"{PLUGIN}::test_vllm_alone_serves_constants_in_its_own_layout",
        },
    ),
    "native fp8": Kind(
        says="native: slots dropped of originals in FP8, by block too",
        outcomes=QUANTIZED,
        by={TRANSFORMERS: "tests/contract/test_quantized.py::test_transformers_alone_loads_drops"},
    ),
    "native mxfp4": Kind(
        says="native: slots dropped of an original in MXFP4 (gpt-oss)",
        outcomes=QUANTIZED | {ALONE: "run"},
        by={
            TRANSFORMERS: "tests/contract/test_quantized.py::test_transformers_alone_loads_drops",
            ALONE: f"{PLUGIN}::test_vllm_alone_serves_drops_of_an_original_in_mxfp4",
        },
    ),
    "reap": Kind(
        says="counts that differ by layer (`--allocation`)",
        method="reap",
        budget={"remove": "25%"},
        options={"allocation": "error"},
        outcomes=OURS,
    ),
    "refit": Kind(says="slots dropped (`refit`), in moetailor format", method="refit", outcomes=OURS),
    "frequency": Kind(says="the same (`frequency`)", method="frequency", outcomes=OURS),
    "ream": Kind(says="experts merged (`ream`), in moetailor format", method="ream", outcomes=OURS),
    "mone": Kind(says="constants (`mone`)", method="mone", outcomes=OURS),
    "conmoe": Kind(says="remaps with scales (`conmoe`)", method="conmoe", outcomes=OURS),
    "linear": Kind(says="linear maps (`linear`)", method="linear", options={"parameters": {"rank": 4}}, outcomes=OURS),
    "lightmoe": Kind(
        says="low ranks over bases (`lightmoe`)",
        method="lightmoe",
        budget={"remove": "25%"},
        options={"parameters": {"rank": 2, "bases": 2}},
        outcomes=OURS,
    ),
    "auto": Kind(says="bits and stand-ins (`auto`)", method="auto", budget={"size": "60%"}, outcomes=OURS),
    "auto, bits=false": Kind(
        says="stand-ins alone (`auto -p bits=false`)",
        method="auto",
        budget={"size": "70%"},
        options={"parameters": {"bits": False}},
        outcomes=OURS,
    ),
    "quantize": rounded("few bits: integers", bits=4),
    "quantize, vq": rounded("few bits: codebooks", codes="vq", bits=2),
    "quantize, fp8": rounded("few bits: FP8 by row", bits=8, codes="fp8"),
    "quantize, fp8b128": rounded("few bits: FP8 by block", bits=8, codes="fp8b128"),
    "quantize, mxfp4": rounded("few bits: MXFP4", codes="mxfp4"),
    "quantize, nvfp4": rounded("few bits: NVFP4", codes="nvfp4"),
    "compressed_experts": Kind(
        says="auxiliary slots (`compressed_experts`)",
        method="compressed_experts",
        budget={"remove": "0%"},
        outcomes=OURS | {SERVED: "refused"},
    ),
    "borrowed": Kind(
        says="experts of other layers (`borrowed` in a plan)",
        outcomes=OURS | {ALONE: "-", LLAMA: "-", SERVED: "refused"},
        by={TRANSFORMERS: "tests/test_runtime.py::test_borrowed_experts_answer_from_their_own_layer"},
    ),
    "codes": Kind(
        says="codes of a quantized original, in moetailor format",
        outcomes=OURS | {ALONE: "-", LLAMA: "-", SERVED: "refused"},
        by={TRANSFORMERS: "tests/contract/test_quantized.py::test_stand_ins_and_merges_lie_beside_codes"},
    ),
}


def pairs(engine: str, *outcomes: str, made: bool = True) -> list[str]:
    """Return the kinds of which an engine makes that.

    Args:
        engine: its name.
        outcomes: which.
        made: only kinds that are made of a tiny model, and have no other test there.
    """
    own = {name for name, kind in KINDS.items() if kind.method and engine not in kind.by}
    return [name for name, kind in KINDS.items() if kind.outcomes[engine] in outcomes and (name in own or not made)]
