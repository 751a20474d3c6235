"""Hydra-configured supervised fine-tuning of language models with PEFT adapters."""

__version__ = "0.1.0"
