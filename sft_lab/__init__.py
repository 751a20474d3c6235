"""Hydra-configured supervised fine-tuning of language models with PEFT adapters."""

import logging

__version__ = "0.1.0"

logging.getLogger(
    "DeepSpeed"
).addFilter(  # at import it tells on standard output, where answers are read, of the device
    lambda record: "accelerator" not in record.getMessage()
)
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())  # at import it tells anyone what a CPU lacks
