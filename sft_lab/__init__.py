"""Hydra-configured supervised fine-tuning of language models with PEFT adapters."""

import logging

__version__ = "0.1.0"

# At import DeepSpeed tells of the device on standard output, where answers are read.
logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator" not in record.getMessage())
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())  # at import it tells anyone what a CPU lacks
