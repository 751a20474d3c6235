"""Hydra-configured supervised fine-tuning of language models with PEFT adapters."""

import logging

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())  # at import it tells anyone what a CPU lacks
