"""vLLM serves the moetailor format: fewer experts than router slots, and lighter things behind the other slots.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``). No function of vLLM is patched:
a quantization method of the format's name reads config.json, and two layers are registered in place of vLLM's own. One
answer of llvmlite is, see `scanned`.
"""

__all__ = ["register"]


def register() -> None:
    """Let vLLM load the format; more than once does no harm."""
    from vllm.model_executor.custom_op import op_registry_oot

    if "RoutedExperts" not in op_registry_oot:
        from moetailor_vllm import gpt_oss as gpt_oss
        from moetailor_vllm import layers as layers
        from moetailor_vllm.scanned import show_own_names

        show_own_names()
