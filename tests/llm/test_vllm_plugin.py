"""What vLLM calls when it starts; it is not installed here: a stand-in for its registry does what that documents."""

from __future__ import annotations

import logging
import sys
import types
from importlib.metadata import entry_points

import pytest

from tenfold.llm import vllm_plugin


class ModelRegistry:
    """vLLM's documented registry: names of architectures to `module:class`."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, model_arch: str, model_cls: str) -> None:
        if len(model_cls.split(":")) != 2:
            raise ValueError("Expected a string in the format `<module>:<class>`")
        self.models[model_arch] = model_cls


@pytest.fixture
def registry(monkeypatch):
    vllm = types.ModuleType("vllm")
    vllm.ModelRegistry = ModelRegistry()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return vllm.ModelRegistry


def test_vllm_finds_the_plugin_and_our_folders_run_on_its_transformers_backend(registry):
    [entry] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "tenfold"]
    entry.load()()
    from transformers import AutoConfig

    from tenfold.llm.families import FAMILIES

    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    assert registry.models == {FAMILIES["tenfold"].architecture: backend}
    assert type(AutoConfig.for_model("tenfold_llm")).__name__ == "TenfoldConfig"


def test_what_is_registered_already_stays(registry):
    registry.models[vllm_plugin.ARCHITECTURE] = "another:Class"
    vllm_plugin.register()
    assert registry.models == {vllm_plugin.ARCHITECTURE: "another:Class"}


def test_without_vllm_or_with_one_that_refuses_it_is_a_line_in_the_log(registry, monkeypatch, caplog):
    monkeypatch.setattr(vllm_plugin, "BACKEND", "no class")
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert registry.models == {} and "Expected a string" in caplog.text
    caplog.clear()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert "vLLM will not know TenfoldForCausalLM" in caplog.text
