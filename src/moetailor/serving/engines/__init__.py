"""The engines: one file for each, registered by being imported here."""

from moetailor.serving.engines import llama_cpp as llama_cpp
from moetailor.serving.engines import transformers as transformers
from moetailor.serving.engines import vllm as vllm
