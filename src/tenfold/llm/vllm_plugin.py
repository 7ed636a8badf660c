"""What vLLM asks installed packages when it starts (entry point `vllm.general_plugins`): our models on its transformers
backend.

    vllm serve FOLDER     # a folder that `tenfold llm convert` or `post-train` wrote

vLLM looks for an unknown architecture in the package transformers alone. So the one that our folders name is given the
class that it would have found there (vLLM's documentation, "Registering a model": out-of-tree models). This follows the
documentation; it has not been run with vLLM.
"""

from __future__ import annotations

import logging

ARCHITECTURE = "TenfoldForCausalLM"
BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Make our models known to transformers' Auto classes and to vLLM, in this process.

    vLLM calls this whatever model it serves, so that what does not work here is a line in its log and no error.
    """
    try:
        from vllm import ModelRegistry

        import tenfold.llm.transformers_model  # noqa: F401 - registers itself

        if ARCHITECTURE not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(ARCHITECTURE, BACKEND)  # by name, so that nothing touches a GPU yet
    except Exception as error:  # another vLLM or transformers than this was written for may raise anything
        logging.getLogger(__name__).warning("tenfold: vLLM will not know %s: %s", ARCHITECTURE, error)
